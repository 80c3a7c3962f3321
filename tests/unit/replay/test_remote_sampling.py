"""Sampling over shards of other nodes: the batches of a local reader, uniform over what lives."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from replay import synthetic
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.remote import RemoteShard
from replay.service import ShardServer, serve_shard
from replay.shard import ReplayShard
from system.experience import Sequence, StreamId, WriteBack

TABLE = synthetic.vector_table()
BATCH, LENGTH = 8, 10
ROWS = {0: (90, 40), 1: (200,), 2: (30, 60, 25)}  # of each stream, by shard
PATIENCE = 20.0


class Node:
    """One shard with a directory of its own, served."""

    def __init__(self, base: Path, index: int, *, root: Path | None = None) -> None:
        self.root = root or base / f"node-{index}"
        self.shard = ReplayShard(self.root, index, TABLE, capacity_rows=4096)
        for env, count in enumerate(ROWS[index]):
            self.shard.append([synthetic.rows(TABLE, StreamId(actor=index, env=env), 0, count)], 5.0)
        self.server: ShardServer = serve_shard(self.shard, "127.0.0.1:0")

    def close(self) -> None:
        self.server.stop(0)
        self.shard.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def reader(stack: ExitStack, root: Path, nodes: list[Node]) -> LocalReader:
    remotes = [RemoteShard(n.shard.index, n.server.address, TABLE, poll_seconds=0.01) for n in nodes]
    made = LocalReader(
        root,
        TABLE,
        batch=BATCH,
        length=LENGTH,
        context=0,
        seed=7,
        limiter=RateLimiter(1e9, 1, 1 << 40, 1),
        controls=[],
        remotes=remotes,
    )
    stack.enter_context(closing(made))
    return made


def wait_for(done: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not done():
        assert time.monotonic() < deadline
        pause.wait(0.005)


def all_rows() -> int:
    return sum(map(sum, ROWS.values()))


def same(one: Sequence, other: Sequence) -> None:
    for name in ("shard", "stream", "start"):
        np.testing.assert_array_equal(getattr(one.ids, name), getattr(other.ids, name))
    for name, values in one.columns.items():
        np.testing.assert_array_equal(values, other.columns[name], err_msg=name)


@pytest.mark.parametrize("near", [(), (0,), (2, 1)], ids=["all-remote", "one-local", "two-local"])
def test_equal_seeds_give_equal_batches_wherever_the_shards_are(
    tmp_path: Path, stack: ExitStack, near: tuple[int, ...]
) -> None:
    together = [stack.enter_context(closing(Node(tmp_path, n, root=tmp_path / "all"))) for n in ROWS]
    here = tmp_path / "here"
    nodes = [stack.enter_context(closing(Node(tmp_path, n, root=here if n in near else None))) for n in ROWS]
    local, mixed = reader(stack, together[0].root, []), reader(stack, here, nodes)
    wait_for(lambda: mixed.counts()[1] == all_rows())
    rng = np.random.default_rng(0)
    for _ in range(25):
        batches = local.sample(5.0), mixed.sample(5.0)
        same(*batches)
        latent = rng.integers(0, 1 << 16, size=(BATCH, LENGTH, 2), dtype=np.uint16)
        for source, batch in zip((local, mixed), batches, strict=True):
            back = WriteBack(ids=batch.ids, offset=0, columns={"latent": latent})
            assert source.write_back(back) == BATCH * LENGTH


def starts_of(sampled: LocalReader, batches: int) -> dict[tuple[int, int, int], int]:
    found: dict[tuple[int, int, int], int] = {}
    for _ in range(batches):
        ids = sampled.sample(5.0).ids
        for key in zip(ids.shard.tolist(), ids.stream.tolist(), ids.start.tolist(), strict=True):
            found[key] = found.get(key, 0) + 1
    return found


def uniform_over(found: dict[tuple[int, int, int], int], shards: tuple[int, ...]) -> float:
    """p of the starts found, all legal starts of these shards being equally likely."""
    legal = {
        (shard, shard << 16 | env, start)
        for shard in shards
        for env, count in enumerate(ROWS[shard])
        for start in range(count - LENGTH + 1)
    }
    assert found.keys() <= legal
    return float(stats.chisquare([found.get(key, 0) for key in sorted(legal)]).pvalue)


def test_starts_are_uniform_over_living_shards_and_again_when_one_returns(
    tmp_path: Path, stack: ExitStack
) -> None:
    nodes = {n: stack.enter_context(closing(Node(tmp_path, n))) for n in ROWS}
    sampled = reader(stack, tmp_path / "here", list(nodes.values()))
    wait_for(lambda: sampled.counts()[1] == all_rows())
    assert uniform_over(starts_of(sampled, 250), (0, 1, 2)) > 1e-4
    nodes[1].server.stop(0)
    sampled.sample(5.0)  # plans made for the dead shard are drawn anew
    wait_for(lambda: sampled.counts()[1] == all_rows() - 200)
    assert uniform_over(starts_of(sampled, 250), (0, 2)) > 1e-4
    nodes[1].server = serve_shard(nodes[1].shard, nodes[1].server.address)
    wait_for(lambda: sampled.counts()[1] == all_rows())
    starts_of(sampled, 5)  # planned while it was away
    assert uniform_over(starts_of(sampled, 250), (0, 1, 2)) > 1e-4
