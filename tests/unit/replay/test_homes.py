"""Home shards: even, stable assignment; moves that neither double a row nor lose an acknowledged one."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay import synthetic
from replay.client import GrpcReplayWriter
from replay.homes import HomedWriter, answers, assign, ranked
from replay.index import StreamRuns
from replay.rows import Home, RowViews
from replay.service import ShardServer, serve_shard
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import ConfigError, DeadlineError
from system.experience import Ack, Chunk, StreamId

TABLE = synthetic.vector_table()
EPISODE = 1000
ACTOR = 3


def rows(start: int, count: int, env: int = 0) -> Chunk:
    return synthetic.rows(TABLE, StreamId(actor=ACTOR, env=env), start, count, episode_length=EPISODE)


class Shards:
    """Served shards of one table."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards: dict[int, ReplayShard] = {}
        self.servers: dict[int, ShardServer] = {}
        self.addresses: dict[int, str] = {}

    def start(self, index: int, **settings: Any) -> None:
        self.shards[index] = ReplayShard(self.root, index, TABLE, capacity_rows=65536, **settings)
        address = self.addresses.get(index, "127.0.0.1:0")
        self.servers[index] = serve_shard(self.shards[index], address)
        self.addresses[index] = self.servers[index].address

    def stop(self, index: int) -> None:
        self.servers.pop(index).stop(0)
        self.shards.pop(index).close()

    def stored(self, env: int = 0) -> Counter[int]:
        """How often each row of a stream is stored, over all shards."""
        view, found = TableView(self.root, TABLE, 1), Counter[int]()
        for (_, stream), runs in view.index.streams.items():
            if stream == ACTOR << 16 | env:
                for lo, hi in runs.bounds:
                    numbers = self._numbers(runs, lo, hi)
                    assert all(b == a + 1 for a, b in pairwise(numbers)), "a sequence would span a gap"
                    found.update(numbers)
        view.release()
        return found

    @staticmethod
    def _numbers(runs: StreamRuns[Home], lo: int, hi: int) -> list[int]:

        columns = {name: np.zeros((hi - lo, *s.shape), s.dtype) for name, s in TABLE.all.items()}
        views, at = RowViews(columns), 0
        for home, first, count in runs.pieces(lo, hi - lo):
            home.copy_rows(views, at, first, count)
            at += count
        return synthetic.row_number(columns, EPISODE).tolist()


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Shards]:
    made = Shards(tmp_path / "replay")
    yield made
    for index in list(made.servers):
        made.stop(index)


@pytest.fixture
def open_writer(shards: Shards) -> Iterator[Callable[..., HomedWriter]]:
    with ExitStack() as stack:

        def make(**settings: Any) -> HomedWriter:
            chosen: dict[str, Any] = {"patience_seconds": 0.1, "probe_seconds": 0.0} | settings
            writer = HomedWriter(
                ACTOR, 8, shards.addresses, lambda address: GrpcReplayWriter(address, TABLE), **chosen
            )
            stack.callback(writer.close)
            return writer

        yield make


@pytest.mark.parametrize(("actors", "count"), [(1, 1), (2, 2), (12, 3), (100, 7), (3, 8)])
def test_actors_are_spread_evenly(actors: int, count: int) -> None:
    load = Counter(assign(actors, range(count)))
    assert max(load.values()) <= -(-actors // count)
    assert sum(load.values()) == actors


def test_the_assignment_does_not_depend_on_the_order_of_the_shards() -> None:
    assert assign(20, [0, 1, 2, 3]) == assign(20, [3, 1, 0, 2])


def test_few_actors_move_when_a_shard_joins_or_leaves() -> None:
    before, after = assign(120, range(6)), assign(120, [0, 1, 2, 3, 5])
    forced = before.count(4)
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert forced <= moved <= forced + 30  # a sixth must; by number modulo shards five sixths would
    refuges = Counter(next(s for s in ranked(actor, range(6)) if s != 4) for actor in range(120))
    assert min(refuges[s] for s in (0, 1, 2, 3, 5)) >= 10  # a lost shard's actors go to all others


def test_no_shard_is_no_home() -> None:
    with pytest.raises(ConfigError, match="at least one replay shard"):
        assign(2, [])


def fail(writer: HomedWriter, chunk: Chunk, timeout: float = 0.2) -> None:
    with pytest.raises(DeadlineError):
        writer.append([chunk], timeout)


def test_rows_of_unknown_fate_are_dropped_and_counted_and_never_sent_elsewhere(
    shards: Shards, open_writer: Callable[..., HomedWriter]
) -> None:
    for index in range(3):
        shards.start(index, initial_grant=120)
    writer = open_writer()
    home = writer.home
    assert writer.append([rows(0, 100)], 5.0).committed == 100
    fail(writer, rows(100, 50))  # 20 go in, 30 wait for credit
    assert writer.home == home
    shards.stop(home)
    assert writer.append([rows(100, 50)], 0.2) == Ack(committed=0, duplicates=0)
    assert writer.home != home
    assert writer.lost_rows == 50
    assert writer.append([rows(150, 50)], 5.0).committed == 50
    assert writer.append([rows(200, 50)], 5.0).committed == 50
    shards.start(home)
    assert writer.append([rows(250, 50)], 5.0).committed == 50  # back at its own
    assert writer.home == home
    assert writer.append([rows(300, 50), rows(0, 5, env=1)], 5.0).committed == 55
    stored = shards.stored()
    assert set(stored.values()) == {1}
    assert set(range(350)) - stored.keys() == set(range(120, 150))


def test_a_shard_that_holds_rows_back_is_not_left(
    shards: Shards, open_writer: Callable[..., HomedWriter]
) -> None:
    for index in range(2):
        shards.start(index, initial_grant=10)
    writer = open_writer(patience_seconds=0.01)
    home = writer.home
    for _ in range(4):
        fail(writer, rows(0, 20))
    assert writer.home == home
    shards.shards[home].grant(20)
    assert writer.append([rows(0, 20)], 5.0) == Ack(committed=10, duplicates=10)
    assert writer.lost_rows == 0


def test_a_silent_home_without_a_refuge_is_waited_for(
    shards: Shards, open_writer: Callable[..., HomedWriter]
) -> None:
    for index in range(2):
        shards.start(index)
    writer = open_writer()
    home = writer.home
    writer.append([rows(0, 10)], 5.0)
    for index in range(2):
        shards.stop(index)
    for _ in range(2):
        fail(writer, rows(10, 10))
    shards.start(home)
    assert writer.append([rows(10, 10)], 20.0).committed == 10
    assert (writer.home, writer.lost_rows) == (home, 0)


def test_joining_and_leaving_shards_move_actors_without_loss(
    shards: Shards, open_writer: Callable[..., HomedWriter]
) -> None:
    for index in range(4):
        shards.start(index)
    writer = open_writer()
    first, sent, homes = writer.home, 0, set[int]()
    for members in ([0, 1], [2, 3], [0, 1, 2, 3], [1], [0, 2, 3], [0, 1, 2, 3]):
        writer.set_shards({index: shards.addresses[index] for index in members})
        for _ in range(3):
            assert writer.append([rows(sent, 7)], 10.0).committed == 7
            sent += 7
        assert writer.home == assign(8, members)[ACTOR]
        homes.add(writer.home)
    assert writer.home == first
    assert len(homes) > 1
    assert shards.stored() == dict.fromkeys(range(sent), 1)
    assert writer.lost_rows == 0


def test_a_home_at_a_new_address_is_the_same_home(
    shards: Shards, open_writer: Callable[..., HomedWriter]
) -> None:
    shards.start(0)
    writer = open_writer()
    writer.append([rows(0, 10)], 5.0)
    shards.stop(0)
    del shards.addresses[0]
    shards.start(0)
    writer.set_shards(shards.addresses)
    assert writer.append([rows(10, 10)], 10.0).committed == 10
    assert shards.stored() == dict.fromkeys(range(20), 1)


def test_an_address_answers_when_somebody_listens(shards: Shards) -> None:
    shards.start(0)
    assert answers(shards.addresses[0], timeout=20.0)
    shards.stop(0)
    assert not answers(shards.addresses[0], timeout=0.05)
