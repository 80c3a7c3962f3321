"""Exact resume with the real agent and a real replay on disk: a killed learner goes on as if it never died.

Straight and killed lives see the same rows of the toy environment; the killed one leaves nothing but its
checkpoint, its pins, and a replay that went on without it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.envs.catalog import make_env
from actors.loop import env_loop
from actors.random_policy import RandomPolicy
from actors.staging import Staging
from learner.batches import Batches
from learner.catalog import make_agent, make_config, overlay_columns
from learner.checkpoint import CheckpointStore
from learner.loop import LearnerTick, learn_loop, resume
from learner.publish import Publisher
from replay.cut import Cut
from replay.limiter import RateLimiter
from replay.pins import PinStore
from replay.reader import LocalReader
from replay.restore import restore_exact
from replay.selection import Sampling
from replay.shard import ReplayShard
from system.experience import Chunk
from system.params.memory import MemoryWeights
from system.specs import TableSpec

SMALL = {"size": "nano", "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "units": 8, "bins": 15}
CONFIG = make_config("dreamer", SMALL)
OPTIONS = {"drop_obs": ["image"]}
ENVS, CHUNK = 3, 16
ENV = make_env("toy:counter", ENVS, options=OPTIONS).spec
TABLE = TableSpec.of(ENV, overlay_columns("dreamer", CONFIG, ENV))
SAVED, LAST = 4, 9
MIXED = Sampling(shares={"uniform": 1, "online": 1, "recency": 1, "prioritized": 1})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def collect(rounds: int) -> list[Chunk]:
    """What one actor sends in `rounds` rounds."""
    env = make_env("toy:counter", ENVS, options=OPTIONS)
    env.start(7)
    loop = env_loop(env, RandomPolicy(ENV.action, 0, TABLE.overlay), "train")
    staging, chunks = Staging(0, 1, ENVS, TABLE, TABLE.overlay, CHUNK), []
    for _ in range(rounds):
        while not staging.full:
            staging.add(next(loop))
        chunks += staging.flush()
    return chunks


class Life:
    """Shard, reader and learner over one directory. kill() drops them as SIGKILL would: nothing is saved."""

    def __init__(self, root: Path, depth: int) -> None:
        self.held = ExitStack()
        replay = root / "replay"
        self.shard = ReplayShard(replay, 0, TABLE, capacity_rows=1024, segment_rows=128)
        self.held.callback(self.shard.close)
        self.pins = PinStore(replay, hold=True)
        self.held.callback(self.pins.close)
        self.agent = make_agent("dreamer", CONFIG, ENV, device="cpu", seed=7, priority_signal="model")
        self._depth, self._replay, self._root = depth, replay, root

    def learn(self) -> Iterator[LearnerTick]:
        limiter = RateLimiter(train_ratio=1e4, prefill_rows=32, tolerance_rows=1 << 20, min_rows=9)
        reader = self.held.enter_context(
            closing(
                LocalReader(
                    self._replay, TABLE, batch=4, length=8, context=1, seed=3, limiter=limiter,
                    controls=[self.shard], sampling=MIXED, ring=self._depth + 2,
                    before_overwrite=self.pins.before,
                )
            )
        )  # fmt: skip
        assert reader.settle(10.0)
        publisher = Publisher(self.agent, MemoryWeights(), every_updates=1)
        batches = Batches(reader, self._depth, 10.0, ring=self._depth + 2, exact=True)
        store = CheckpointStore(self._root / "checkpoints", keep=2)
        progress = resume(store, self.agent, batches, publisher, {"family": "dreamer"})
        ticks = learn_loop(
            self.agent,
            batches,
            publisher,
            store,
            signature={"family": "dreamer"},
            checkpoint_seconds=1e9,
            checkpoint_on_start=progress.updates == 0,
            checkpoint_asked=lambda: progress.updates == SAVED,
            progress=progress,
            cuts=self.pins,
        )
        self.held.callback(ticks.close)  # type: ignore[attr-defined]
        return ticks

    def kill(self) -> None:
        self.held.close()


def run(life: Life, ticks: Iterator[LearnerTick], until: int) -> dict[str, float]:
    """Train to update `until`; return the last update's metrics."""
    for tick in ticks:
        assert tick.progress.nonfinite == 0
        if tick.progress.updates == until:
            return dict(tick.metrics)
    raise AssertionError("the loop ended early")


def flat(state: Any, path: str = "") -> dict[str, bytes]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{path}/{key}").items()}
    return {path: np.asarray(state).tobytes()}


@pytest.mark.parametrize("depth", [0, 2], ids=["in-step", "drawn-ahead"])
@pytest.mark.parametrize("evict", [False, True], ids=["keeping", "evicting"])
def test_a_killed_learner_resumes_bit_for_bit(tmp_path: Path, depth: int, evict: bool) -> None:
    chunks = collect(40)
    first, later = chunks[: 12 * ENVS], chunks[12 * ENVS : 14 * ENVS]
    # With batches drawn ahead, new rows would meet the twins at other draws: there none come meanwhile.
    later = later if depth == 0 else []

    straight = Life(tmp_path / "straight", depth)
    straight.shard.append(first, 10.0)
    ticks = straight.learn()
    run(straight, ticks, SAVED)
    if later:
        straight.shard.append(later, 10.0)
    wanted = run(straight, ticks, LAST)
    wanted_state = flat(straight.agent.state())
    straight.kill()

    killed = Life(tmp_path / "killed", depth)
    killed.shard.append(first, 10.0)
    ticks = killed.learn()
    run(killed, ticks, SAVED)
    run(killed, ticks, SAVED + 3)  # latents are written that the checkpoint does not know
    if evict:
        killed.shard.append(chunks[12 * ENVS :], 10.0)  # all rows of the checkpoint go
        run(killed, ticks, SAVED + 4)
    killed.kill()

    newest = CheckpointStore(tmp_path / "killed/checkpoints", keep=2).newest_meta()
    assert newest is not None
    name, meta = newest
    assert name.endswith(f"-{SAVED}")
    done = restore_exact(tmp_path / "killed/replay", name, Cut.from_json(meta["replay"]))
    assert done.undone > 0
    assert (done.removed > 0) == (done.returned > 0) == evict

    again = Life(tmp_path / "killed", depth)
    ticks = again.learn()
    if later:
        again.shard.append(later, 10.0)
    found = run(again, ticks, LAST)
    state = flat(again.agent.state())
    again.kill()
    assert found == wanted
    assert state == wanted_state
