"""Exact mode with the real agent: one process, depth 0, fixed seeds; straight equals halves, bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.batches import Batches
from learner.catalog import make_agent, make_config
from learner.checkpoint import CheckpointStore
from learner.families.dreamer.latents import latent_columns
from learner.loop import learn_loop, resume
from learner.publish import Publisher
from replay.limiter import RateLimiter
from replay.memory import MemoryReplay
from replay.synthetic import rows
from system.experience import StreamId
from system.params.memory import MemoryWeights
from system.specs import ActionSpec, ArraySpec, EnvSpec, TableSpec
from system.weights import NO_VERSION, digest_of

SMALL = {"size": "nano", "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "units": 8, "bins": 15}
CONFIG = make_config("dreamer", SMALL)
ENV = EnvSpec(
    name="synthetic",
    obs={"vector": ArraySpec(shape=(4,), dtype="float32")},
    action=ActionSpec(kind="discrete", classes=(3,)),
)
TABLE = TableSpec.of(ENV, latent_columns(CONFIG))


def filled_replay() -> MemoryReplay:
    limiter = RateLimiter(train_ratio=64.0, prefill_rows=100, tolerance_rows=1 << 20, min_rows=10)
    replay = MemoryReplay(TABLE, capacity_rows=2000, batch=2, length=8, context=1, seed=3, limiter=limiter)
    chunk = rows(TABLE, StreamId(actor=0, env=0), 0, 400)
    for name in latent_columns(CONFIG):
        chunk.columns[name][:] = 0  # type: ignore[index]
    replay.append([chunk], 10.0)
    return replay


def train(root: Path, replay: MemoryReplay, total: int) -> tuple[dict[str, Any], str]:
    """Resume what is in `root`, train to `total` updates; return the agent's state and published digest."""
    agent = make_agent("dreamer", CONFIG, ENV, device="cpu", seed=7)
    weights, store = MemoryWeights(), CheckpointStore(root, keep=2)
    publisher = Publisher(agent, weights, every_updates=1)
    progress = resume(store, agent, replay, publisher, {"family": "dreamer"})
    for tick in learn_loop(
        agent,
        Batches(replay, 0, 10.0),
        publisher,
        store,
        signature={"family": "dreamer"},
        checkpoint_seconds=1e9,
        total_updates=total,
        progress=progress,
    ):
        assert tick.progress.nonfinite == 0
        assert tick.metrics["loss/total"] != 0
    newest = weights.latest(NO_VERSION, 0.0)
    assert newest is not None
    assert newest.digest == digest_of(agent.weights())
    return agent.state(), newest.digest


def assert_same_bits(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Mapping):
            assert_same_bits(value, other[key], f"{path}/{key}")
        else:
            assert np.asarray(value).tobytes() == np.asarray(other[key]).tobytes(), f"{path}/{key}"


def test_a_resumed_dreamer_learner_equals_one_that_never_stopped(tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight, straight_digest = train(tmp_path / "straight", filled_replay(), 10)
        replay = filled_replay()
        train(tmp_path / "halves", replay, 5)
        halves, halves_digest = train(tmp_path / "halves", replay, 10)
    finally:
        torch.set_num_threads(threads)
    assert halves_digest == straight_digest
    assert_same_bits(straight, halves)
