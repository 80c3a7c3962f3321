"""A tiny real task for whole agents: a point on a line, pushed left or right, as a replay in memory.

`LineRows` is a whole ReplayReader whose rows come from a simulated random walk and keep their latents.
A test breaks the data through `change`, which sees every batch before the learner does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from learner.catalog import make_agent, make_config, overlay_columns
from system.experience import Sequence, SequenceIds, WriteBack
from system.seeds import generator
from system.specs import ActionSpec, ArraySpec, EnvSpec

ENV = EnvSpec(
    name="line",
    obs={"place": ArraySpec(shape=(2,), dtype="float32")},
    action=ActionSpec(kind="discrete", classes=(2,)),
)
SMALL = {
    **{"size": "nano", "deter": 32, "hidden": 16, "stoch": 8, "classes": 4, "units": 16, "blocks": 4},
    **{"bins": 41, "horizon": 5, "imagination_starts": 32, "lr": 2e-3, "warmup": 20},
}
BATCH, TIME, CONTEXT, ROWS = 8, 12, 1, 1200
EDGE = 8  # the walk ends this far from where it began

Change = Callable[[int, dict[str, np.ndarray]], None]


def walk(seed: int) -> dict[str, np.ndarray]:
    """Columns [ROWS, ...] of episodes of a random walk; the reward is 1 on the right half, else 0."""
    rng = generator(seed, "walk")
    columns = {
        "place": np.zeros((ROWS, 2), np.float32),
        "reward": np.zeros(ROWS, np.float32),
        "action": rng.integers(0, 2, (ROWS, 1)).astype(np.int32),
        **{flag: np.zeros(ROWS, np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
    }
    place, fresh = 0, True
    for row in range(ROWS):
        place = 0 if fresh else place + 2 * int(columns["action"][row - 1, 0]) - 1
        columns["place"][row] = place, abs(place)
        columns["reward"][row] = float(place > 0 and not fresh)
        columns["is_first"][row], fresh = fresh, abs(place) == EDGE
        columns["is_last"][row] = columns["is_terminal"][row] = fresh
    return columns


class LineRows:
    """Draws windows of the walk, uniformly."""

    def __init__(self, latents: Mapping[str, ArraySpec], seed: int = 0, change: Change | None = None) -> None:
        self.columns = walk(seed) | {
            name: np.zeros((ROWS, *spec.shape), spec.dtype) for name, spec in latents.items()
        }
        self.change = change
        self.draws = 0
        self._latents = tuple(latents)
        self._rng = generator(seed, "draws")

    def sample(self, timeout: float) -> Sequence:
        starts = self._rng.integers(0, ROWS - CONTEXT - TIME, BATCH)
        rows = starts[:, None] + np.arange(CONTEXT + TIME)  # [B, C + T]
        columns = {name: values[rows] for name, values in self.columns.items()}
        if self.change is not None:
            self.change(self.draws, columns)
        self.draws += 1
        zeros = np.zeros(BATCH, np.int32)
        ids = SequenceIds(shard=zeros, stream=zeros, start=starts.astype(np.int64))
        return Sequence(columns=columns, ids=ids, context=CONTEXT)

    def write_back(self, rows: WriteBack) -> int:
        for name in self._latents:
            for start, values in zip(rows.ids.start, rows.columns[name], strict=True):
                self.columns[name][start + rows.offset : start + rows.offset + len(values)] = values
        return BATCH * TIME

    def state(self) -> dict[str, Any]:
        return {"draws": self.draws, "rng": self._rng.bit_generator.state}

    def load(self, state: Mapping[str, Any]) -> None:
        self.draws, self._rng.bit_generator.state = state["draws"], state["rng"]

    def close(self) -> None:
        return None


def small_agent(seed: int = 0, **settings: Any) -> tuple[Any, dict[str, ArraySpec], Any]:
    """(agent, its latent columns, its config)."""
    config = make_config("dreamer", SMALL | settings)
    agent = make_agent("dreamer", config, ENV, device="cpu", seed=seed)
    return agent, overlay_columns("dreamer", config, ENV), config
