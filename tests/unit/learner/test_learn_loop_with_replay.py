"""The loop against the in-memory replay with its limiter, filled by a collecting thread meanwhile."""

import threading
from pathlib import Path

import numpy as np
import pytest

from learner.batches import Batches
from learner.checkpoint import CheckpointStore
from learner.loop import learn_loop, resume
from learner.publish import Publisher
from replay.limiter import RateLimiter
from replay.memory import MemoryReplay
from system.errors import DeadlineError
from system.experience import Chunk, StreamId
from system.params.memory import MemoryWeights
from system.specs import ActionSpec, ArraySpec, EnvSpec, TableSpec
from tests.unit.learner.toy_learning import TRUE_WEIGHTS, LinearAgent

BATCH, LENGTH, CONTEXT = 4, 8, 1
TRAIN_RATIO, PREFILL, TOLERANCE = 4.0, 64, 32
TABLE = TableSpec.of(
    EnvSpec(
        name="linear",
        obs={"obs": ArraySpec(shape=(3,), dtype="float32")},
        action=ActionSpec(kind="continuous", size=1),
    ),
    {"latent": ArraySpec(shape=(), dtype="float32")},
)


def make_replay() -> MemoryReplay:
    limiter = RateLimiter(
        train_ratio=TRAIN_RATIO, prefill_rows=PREFILL, tolerance_rows=TOLERANCE, min_rows=LENGTH + CONTEXT
    )
    return MemoryReplay(
        TABLE, capacity_rows=2000, batch=BATCH, length=LENGTH, context=CONTEXT, seed=0, limiter=limiter
    )


class Collector:
    """Appends rows with a linear reward until told to stop, as fast as the limiter lets it."""

    def __init__(self, replay: MemoryReplay) -> None:
        self._replay, self._row = replay, 0
        self._rng = np.random.default_rng(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            chunk = self._chunk(16)
            while not self._stop.is_set():
                try:
                    self._replay.append([chunk], 0.1)
                    break
                except DeadlineError:
                    continue

    def _chunk(self, count: int) -> Chunk:
        step = np.arange(self._row, self._row + count, dtype=np.int32)
        self._row += count
        obs = self._rng.normal(size=(count, 3)).astype(np.float32)
        reward = (obs @ TRUE_WEIGHTS).astype(np.float32)
        reward[step == 0] = 0
        flags = {name: np.zeros(count, np.bool_) for name in ("is_last", "is_terminal")}
        return Chunk(
            stream=StreamId(actor=0, env=0),
            columns={
                "obs": obs,
                "action": np.zeros((count, 1), np.float32),
                "reward": reward,
                "is_first": step == 0,
                **flags,
                "incarnation": np.zeros(count, np.int32),
                "episode": np.zeros(count, np.int32),
                "step": step,
                "policy_version": np.zeros(count, np.int64),
                "latent": np.zeros(count, np.float32),
            },
        )

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20.0)


@pytest.fixture
def replay():
    """A replay that a collector keeps filling until the test ends."""
    replay = make_replay()
    collector = Collector(replay)
    yield replay
    collector.stop()


@pytest.mark.parametrize("depth", [0, 2])
def test_the_train_ratio_is_held_over_a_resume_and_latents_come_back(
    tmp_path: Path, replay: MemoryReplay, depth: int
):
    weights, store = MemoryWeights(), CheckpointStore(tmp_path, keep=2)
    for total in (40, 100):
        agent = LinearAgent()
        publisher = Publisher(agent, weights, every_updates=5)
        progress = resume(store, agent, replay, publisher, {})
        *_, last = learn_loop(
            agent,
            Batches(replay, depth, 1.0, ring=3),
            publisher,
            store,
            signature={},
            checkpoint_seconds=1e9,
            total_updates=total,
            progress=progress,
            starve_seconds=20.0,
        )
        assert last.progress.updates == total
    assert last.version.epoch == 2
    np.testing.assert_allclose(agent.w, TRUE_WEIGHTS, atol=0.05)
    owed = TRAIN_RATIO * (replay.counts()[0] - PREFILL) - last.progress.rows_trained
    drawn_and_dropped = depth * BATCH * LENGTH
    assert -TRAIN_RATIO * TOLERANCE <= owed <= TRAIN_RATIO * TOLERANCE + drawn_and_dropped
    newest = replay.sample(20.0)
    latent = newest.columns["latent"]
    assert np.corrcoef(latent[latent != 0], newest.columns["reward"][latent != 0])[0, 1] > 0.9
