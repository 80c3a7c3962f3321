"""A real, tiny learning problem for the loop's tests: rows whose reward is linear in obs, and a regressor.

LinearAgent is a whole Agent (weights, momentum, own random numbers, state); RowReader a whole
ReplayReader over rows in memory, with the short-lived buffers a mapped reader has.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from system.errors import DeadlineError
from system.experience import Sequence, SequenceIds, WriteBack
from system.seeds import generator

TRUE_WEIGHTS = np.array([1.0, -2.0, 0.5])
BATCH, TIME, CONTEXT = 4, 6, 1


class RowReader:
    """Samples from fixed rows. `ring` buffers are reused in turn; none comes while `open_gate` is clear."""

    def __init__(self, seed: int = 0, ring: int = 1, poison: Mapping[int, float] | None = None) -> None:
        rng = generator(seed, "rows")
        self.obs = rng.normal(size=(500, 3)).astype(np.float32)
        self.reward = (self.obs @ TRUE_WEIGHTS).astype(np.float32)
        self.latent = np.zeros(500, np.float32)  # overlay
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.fail_with: Exception | None = None
        self.poison = dict(poison or {})  # number of the draw -> reward it gets
        self.draws = 0
        self.threads: set[int] = set()
        self.pumped = threading.Event()
        self._rng = generator(seed, "sampler")
        self._ring = [
            {
                "obs": np.zeros((BATCH, TIME, 3), np.float32),
                "reward": np.zeros((BATCH, TIME), np.float32),
                "latent": np.zeros((BATCH, TIME), np.float32),
            }
            for _ in range(ring)
        ]

    def sample(self, timeout: float) -> Sequence:
        self.threads.add(threading.get_ident())
        if not self.open_gate.wait(timeout):
            raise DeadlineError("waiting for the prefill")
        if self.fail_with is not None:
            raise self.fail_with
        columns = self._ring[self.draws % len(self._ring)]
        starts = self._rng.integers(0, 500 - TIME, size=BATCH)
        for b, start in enumerate(starts):
            for name in columns:
                columns[name][b] = getattr(self, name)[start : start + TIME]
        if self.draws in self.poison:
            columns["reward"][:] = self.poison[self.draws]
        self.draws += 1
        zeros = np.zeros(BATCH, np.int32)
        return Sequence(
            columns=columns,
            ids=SequenceIds(shard=zeros, stream=zeros, start=starts.astype(np.int64)),
            context=CONTEXT,
        )

    def write_back(self, rows: WriteBack) -> int:
        self.threads.add(threading.get_ident())
        values = rows.columns["latent"]
        for b, start in enumerate(rows.ids.start):
            self.latent[start + rows.offset : start + rows.offset + values.shape[1]] = values[b]
        return int(values.size)

    def pump(self) -> None:
        self.pumped.set()

    def state(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state, "draws": self.draws}

    def load(self, state: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self.draws = state["draws"]

    def close(self) -> None:
        self.open_gate.clear()


class LinearAgent:
    """Least squares by gradient descent with momentum and a little noise of its own.

    `guarded` agents skip a non-finite update themselves, as the real families do; it ruins the others.
    """

    def __init__(self, seed: int = 0, guarded: bool = True) -> None:
        self.w = np.zeros(3)
        self.momentum = np.zeros(3)
        self.rng = generator(seed, "agent")
        self.guarded = guarded

    def initial(self, batch: int) -> np.ndarray:
        return np.zeros(batch)

    def learn(
        self, sequence: Sequence, carry: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float], WriteBack | None]:
        assert not carry.any(), "sampled sequences do not continue each other"
        context = sequence.context
        obs = sequence.columns["obs"][:, context:].astype(np.float64)  # [B, T, 3]
        reward = sequence.columns["reward"][:, context:].astype(np.float64)  # [B, T]
        error = obs @ self.w - reward
        loss = float(np.mean(error**2))
        if self.guarded and not np.isfinite(loss):
            return carry + 1, {"loss/total": loss, "nonfinite": 1.0}, None
        gradient = np.mean(error[..., None] * obs, axis=(0, 1)) + 1e-3 * self.rng.normal(size=3)
        self.momentum = 0.5 * self.momentum + gradient
        self.w = self.w - 0.2 * self.momentum
        latents = (obs @ self.w).astype(np.float32)  # [B, T]
        rows = WriteBack(ids=sequence.ids, offset=context, columns={"latent": latents})
        return carry + 1, {"loss/total": loss, "grad_norm": float(np.linalg.norm(gradient))}, rows

    def weights(self) -> dict[str, np.ndarray]:
        return {"w": self.w.copy()}

    def state(self) -> dict[str, Any]:
        return {"w": self.w.copy(), "momentum": self.momentum.copy(), "rng": self.rng.bit_generator.state}

    def load(self, state: Mapping[str, Any]) -> None:
        self.w, self.momentum = np.array(state["w"]), np.array(state["momentum"])
        self.rng.bit_generator.state = state["rng"]


def eventually(condition, seconds: float = 20.0) -> None:
    """Return as soon as `condition()` is true; fail when it does not become so."""
    deadline = time.monotonic() + seconds
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        tick.wait(0.005)
