"""Who computes the hot regions: what was asked for, or an error; checkpoints move between backends."""

import numpy as np
import pytest
import torch

from learner import backends
from learner.backends import TORCH, choose_backend
from learner.catalog import make_agent, make_config, overlay_columns
from learner.native.library import absence, available
from system.errors import PreflightError
from tests.golden.learner.curves import CASES, draw

CPU = torch.device("cpu")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler."""
    monkeypatch.setattr(backends, "available", lambda: False)
    monkeypatch.setattr(backends, "absence", lambda: "no C++ compiler")


def test_auto_takes_torch_where_nothing_can_be_compiled(bare: None) -> None:
    assert choose_backend("auto", CPU, "fp32") is TORCH


def test_native_is_refused_where_nothing_can_be_compiled(bare: None) -> None:
    with pytest.raises(PreflightError, match=r"no C\+\+ compiler"):
        choose_backend("native", CPU, "fp32")


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "fp32"), ("cpu", "bf16")])
def test_native_is_for_float32_on_cpus(device: str, dtype: str) -> None:
    assert choose_backend("auto", torch.device(device), dtype) is TORCH
    with pytest.raises(PreflightError, match=f"{dtype} on {device}"):
        choose_backend("native", torch.device(device), dtype)


def test_torch_is_torch_whatever_could_be_compiled() -> None:
    assert choose_backend("torch", CPU, "fp32") is TORCH


@pytest.mark.parametrize(("first", "second"), [("torch", "native"), ("native", "torch")])
def test_a_checkpoint_moves_between_backends(first: str, second: str) -> None:
    if not available():
        pytest.skip(f"no compiled regions: {absence()}")
    settings, env, _ = CASES["official-continuous"]
    configs = {name: make_config("dreamer", settings | {"backend": name}) for name in (first, second)}
    agents = {
        name: make_agent("dreamer", config, env, device="cpu", seed=0) for name, config in configs.items()
    }
    sequence = draw(env, overlay_columns("dreamer", configs[first], env), 0, weighted=False)
    before, after = agents[first], agents[second]
    before.learn(sequence, {})
    after.load(before.state())
    expected, actual = before.learn(sequence, {})[1], after.learn(sequence, {})[1]
    for name in (key for key in expected if key.startswith("loss/")):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, err_msg=name)
