"""States that checkpoints are tested with: every kind of value one may hold."""

from typing import Any

import numpy as np


def some_state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "agent": {
            "weights": rng.normal(size=(40, 30)).astype(np.float32),
            "moments": {"ema": np.float64(0.5), "low": -np.inf, "high": float("nan")},
            "codes": rng.integers(0, 255, size=17, dtype=np.uint8),
            "mask": rng.random(9) < 0.5,
            "half": rng.normal(size=(3, 0, 2)).astype(np.float16),
            "scalar": np.array(step, np.int64),
            "strided": rng.normal(size=(6, 4)).T[::2],
        },
        "reader": {"rng": rng.bit_generator.state, "shards": [{"inserted": 5}, {"inserted": 2**70}]},
        "updates": step,
        "note": "ünïcode",
        "nothing": None,
    }


def assert_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    else:
        assert got == expected or (got != got and expected != expected)
