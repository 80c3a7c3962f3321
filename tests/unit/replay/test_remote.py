"""Shards read over the wire: the same rows as on their node; what happens when they die, move, come back."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

from replay import layout, synthetic
from replay.episodes import EpisodeStarts, FlagHome
from replay.experience_pb2 import BoundsRequest, FlagsRequest, OverlayRows, ReadRequest, WriteBackRequest
from replay.experience_pb2_grpc import ReplayServiceStub
from replay.index import StartIndex
from replay.remote import RemoteShard
from replay.rows import Home, RowsGone, RowViews
from replay.service import ShardServer, serve_shard
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import RejectedError
from system.experience import StreamId
from system.specs import TableSpec
from system.wire import call_metadata, error_of, open_channel

TABLE = synthetic.vector_table()
PATIENCE = 20.0


class Cluster:
    """Shards with a directory of their own each, as on different nodes, and views of them from elsewhere."""

    def __init__(self, base: Path, stack: ExitStack) -> None:
        self.base, self.stack = base, stack
        self.shards: dict[int, ReplayShard] = {}
        self.servers: dict[int, ShardServer] = {}
        self.addresses: dict[int, str] = {}

    def start(self, index: int, *, port: int = 0, table: TableSpec = TABLE) -> str:
        shard = ReplayShard(self.base / f"node-{index}", index, table, capacity_rows=4096)
        server = serve_shard(shard, f"127.0.0.1:{port}")
        self.shards[index], self.servers[index] = shard, server
        self.addresses[index] = server.address
        return server.address

    def stop(self, index: int) -> None:
        self.servers.pop(index).stop(0)
        self.shards.pop(index).close()

    def fill(self, index: int, *, streams: int = 2, rows: int = 200, start: int = 0) -> None:
        for env in range(streams):
            stream = StreamId(actor=index, env=env)
            self.shards[index].append([synthetic.rows(TABLE, stream, start, rows)], 5.0)

    def remote(self, index: int, address: str | Callable[[], str] | None = None) -> RemoteShard:
        where = address if address is not None else self.addresses[index]
        shard = RemoteShard(index, where, TABLE, poll_seconds=0.01)
        self.stack.callback(shard.release, StartIndex[Home](1))
        return shard


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(tmp_path, stack)
        yield made
        stack.close()
        for index in list(made.servers):
            made.stop(index)


def wait_for(
    view: TableView | RemoteShard, done: Callable[[], bool], index: StartIndex[Home] | None = None
) -> None:
    """Refresh until `done`; fails when that takes PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while True:
        if isinstance(view, TableView):
            view.refresh()
        else:
            assert index is not None
            view.refresh(index)
        if done():
            return
        assert time.monotonic() < deadline
        pause.wait(0.005)


def buffer(rows: int) -> tuple[dict[str, np.ndarray], RowViews]:
    columns = {name: np.zeros((rows, *spec.shape), spec.dtype) for name, spec in TABLE.all.items()}
    return columns, RowViews(columns)


def read(index: StartIndex[Home], shard: int, stream: int, start: int, rows: int) -> dict[str, np.ndarray]:
    columns, views = buffer(rows)
    at = 0
    for home, first, count in index.streams[shard, stream].pieces(start, rows):
        home.copy_rows(views, at, first, count)
        at += count
    return columns


def same(found: dict[str, np.ndarray], stream: StreamId, start: int) -> None:
    wanted = synthetic.rows(TABLE, stream, start, len(found["reward"])).columns
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_rows_come_over_the_wire_byte_for_byte(cluster: Cluster) -> None:
    cluster.start(1)
    cluster.fill(1, rows=300)
    index: StartIndex[Home] = StartIndex(20)
    remote = cluster.remote(1)
    wait_for(remote, lambda: index.rows == 600, index)
    assert remote.alive
    assert remote.distant
    assert (remote.inserted, remote.rows) == (600, 600)
    about = layout.read_json(cluster.shards[1].directory / "shard.json")
    assert about is not None
    assert remote.capacity() == (4096, about["slots"] * about["rows"])
    stream = StreamId(actor=1, env=1)
    for start in (0, 37, 100, 280):
        same(read(index, 1, 1 << 16 | 1, start, 20), stream, start)


def test_rows_asked_for_ahead_come_several_per_call(cluster: Cluster) -> None:
    cluster.start(0)
    cluster.fill(0)
    index: StartIndex[Home] = StartIndex(10)
    remote = cluster.remote(0)
    wait_for(remote, lambda: index.rows == 400, index)
    (home,) = {id(run.home): run.home for run in index.streams[0, 0].runs}.values()
    for start in range(0, 190, 10):
        home.will_need(start, 10)
    home.will_need(0, 10)  # drawn twice
    for start in (*range(0, 190, 10), 0):
        columns, views = buffer(10)
        home.copy_rows(views, 0, start, 10)
        same(columns, StreamId(actor=0, env=0), start)
    assert remote.fetcher.fetched_rows == 190
    assert remote.fetcher.kept == 0


def test_growth_and_eviction_arrive(cluster: Cluster) -> None:
    cluster.start(0)
    index: StartIndex[Home] = StartIndex(1)
    remote = cluster.remote(0)
    for start in range(0, 6000, 500):  # capacity is 4096 rows
        cluster.fill(0, streams=1, rows=500, start=start)
        wait_for(remote, lambda start=start: remote.inserted == start + 500, index)
    there = TableView(cluster.base / "node-0", TABLE, 1)
    bounds = there.index.streams[0, 0].bounds
    there.release()
    assert bounds[0][0] > 0
    wait_for(remote, lambda: index.streams[0, 0].bounds == bounds, index)
    assert remote.rows == index.rows == sum(hi - lo for lo, hi in bounds)
    with pytest.raises(RowsGone):
        index.streams[0, 0].runs[0].home.copy_rows(buffer(5)[1], 0, 0, 5)
    same(read(index, 0, 0, bounds[0][0], 50), StreamId(actor=0, env=0), bounds[0][0])


def test_a_dead_shard_leaves_the_index_and_comes_back_at_a_new_address(cluster: Cluster) -> None:
    for number in range(3):
        cluster.start(number)
        cluster.fill(number)
    view = TableView(
        cluster.base / "empty",
        TABLE,
        10,
        remotes=[cluster.remote(n, lambda n=n: cluster.addresses[n]) for n in range(3)],
    )
    wait_for(view, lambda: view.index.rows == 1200)
    home = view.index.streams[1, 1 << 16].runs[0].home
    cluster.stop(1)
    wait_for(view, lambda: view.index.rows == 800)
    assert {shard for shard, stream in view.index.streams if view.index.streams[shard, stream].runs} == {0, 2}
    assert [shard.alive for shard in view.views] == [True, False, True]
    assert view.inserted(3) == [400, 400, 400]  # what was inserted stays inserted
    with pytest.raises(RowsGone):
        home.copy_rows(buffer(5)[1], 0, 0, 5)
    home.will_need(0, 5)
    cluster.start(1)  # another port
    cluster.fill(1, rows=10, start=200)
    wait_for(view, lambda: view.index.rows == 1220)
    same(read(view.index, 1, 1 << 16, 150, 60), StreamId(actor=1, env=0), 150)
    view.release()


def test_a_shard_is_found_where_it_is_said_to_be(cluster: Cluster) -> None:
    cluster.start(0)
    cluster.fill(0)
    index: StartIndex[Home] = StartIndex(1)
    remote = cluster.remote(0, "")
    remote.refresh(index)
    assert not remote.alive
    remote.set_address(cluster.addresses[0])
    wait_for(remote, lambda: index.rows == 400, index)


def test_another_shard_at_the_address_is_not_taken_for_ours(cluster: Cluster) -> None:
    address = cluster.start(0)
    cluster.fill(0)
    index: StartIndex[Home] = StartIndex(1)
    other = cluster.remote(1, address)
    foreign = RemoteShard(0, address, synthetic.vector_table(7), poll_seconds=0.01)
    cluster.stack.callback(foreign.release, index)
    right = cluster.remote(0, address)
    for shard in (other, foreign):
        shard.refresh(index)
    wait_for(right, lambda: right.rows == 400, StartIndex(1))
    assert index.rows == 0
    assert not other.alive
    assert not foreign.alive


def test_a_learner_reads_what_it_wrote_back(cluster: Cluster) -> None:
    cluster.start(0)
    cluster.fill(0)
    index: StartIndex[Home] = StartIndex(1)
    remote = cluster.remote(0)
    wait_for(remote, lambda: index.rows == 400, index)
    home = index.streams[0, 0].runs[0].home
    new = np.zeros((10, 2), np.uint16)
    for value in range(50):
        home.will_need(5, 20)  # on its way while the rows change
        new = np.full((10, 2), 1000 + value, np.uint16)
        assert home.write_overlay("latent", 10, new) == 10
        columns, views = buffer(20)
        home.copy_rows(views, 0, 5, 20)
        np.testing.assert_array_equal(columns["latent"][5:15], new)
        old = synthetic.rows(TABLE, StreamId(actor=0, env=0), 5, 5).columns["latent"]
        np.testing.assert_array_equal(columns["latent"][:5], old)
    assert remote.flush(PATIENCE)
    there = TableView(cluster.base / "node-0", TABLE, 1)
    np.testing.assert_array_equal(read(there.index, 0, 0, 10, 10)["latent"], new)
    there.release()
    same_rows = read(index, 0, 0, 30, 10)
    same(same_rows, StreamId(actor=0, env=0), 30)
    cluster.stop(0)
    wait_for(remote, lambda: not remote.alive, index)
    assert home.write_overlay("latent", 10, new) == 0


def test_a_local_directory_is_read_without_the_wire(cluster: Cluster) -> None:
    cluster.start(0)
    cluster.start(1)
    for number in range(2):
        cluster.fill(number)
    view = TableView(cluster.base / "node-0", TABLE, 10, remotes=[cluster.remote(n) for n in range(2)])
    wait_for(view, lambda: view.index.rows == 800)
    assert [shard.distant for shard in view.views] == [False, True]
    view.release()


def test_episodes_are_found_by_their_flags_alone(cluster: Cluster) -> None:
    cluster.start(1)
    for start in range(0, 400, 50):
        cluster.fill(1, rows=50, start=start)
    index: StartIndex[Home] = StartIndex(6)
    remote = cluster.remote(1)
    wait_for(remote, lambda: index.rows == 800, index)
    view = TableView(cluster.base / "node-1", TABLE, 6)
    far, near = EpisodeStarts(index, TABLE.all), EpisodeStarts(view.index, TABLE.all)
    assert 0 < far.total == near.total < 800 - 2 * 5
    draws = np.arange(far.total, dtype=np.int64)
    for one, other in zip(far.pick(draws), near.pick(draws), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (remote.fetcher.fetched_rows, remote.fetcher.kept) == (0, 0)  # no row came over the wire
    for piece in view.index.streams[1, 1 << 16].pieces(0, 400):
        assert isinstance(piece.home, FlagHome)
    (piece,) = index.streams[1, 1 << 16].pieces(3, 390)
    assert isinstance(piece.home, FlagHome)
    wanted = synthetic.rows(TABLE, StreamId(actor=1, env=0), 3, 390).columns["is_first"]
    np.testing.assert_array_equal(piece.home.first_flags(piece.first, piece.rows), wanted)
    with pytest.raises(RowsGone, match="are gone"):
        piece.home.first_flags(300, 101)
    cluster.stop(1)
    with pytest.raises(RowsGone, match="shard 1"):
        piece.home.first_flags(0, 5)
    view.release()


@pytest.mark.parametrize(
    ("name", "request_", "role", "reason"),
    [
        ("Read", ReadRequest(origin=[0]), "learner", "life"),
        ("Read", ReadRequest(origin=[0]), "actor", "role"),
        ("Flags", FlagsRequest(count=1), "learner", "life"),
        ("Flags", FlagsRequest(count=1), "actor", "role"),
        ("WriteBack", WriteBackRequest(), "driver", "role"),
        ("WriteBack", WriteBackRequest(), "learner", "life"),
    ],
)
def test_calls_that_are_not_ours_are_refused(
    cluster: Cluster, name: str, request_: object, role: str, reason: str
) -> None:
    with open_channel(cluster.start(0)) as channel, pytest.raises(grpc.RpcError) as failed:
        getattr(ReplayServiceStub(channel), name)(request_, timeout=5.0, metadata=call_metadata(role))
    error = error_of(failed.value, "shard")
    assert isinstance(error, RejectedError)
    assert error.reason == reason


def test_requests_for_what_no_shard_has_are_answered_or_refused(cluster: Cluster) -> None:
    address = cluster.start(0)
    cluster.fill(0)
    with open_channel(address) as channel:
        stub, who = ReplayServiceStub(channel), {"timeout": 5.0, "metadata": call_metadata("learner")}
        (page,) = stub.Bounds(BoundsRequest(schema=TABLE.digest, shard=0), **who)

        def refused(name: str, request: object) -> str:
            with pytest.raises(grpc.RpcError) as failed:
                getattr(stub, name)(request, **who)
            error = error_of(failed.value, "shard")
            assert isinstance(error, RejectedError), error
            return error.reason

        def ask(*spans: tuple[int, int, int, int]) -> list[int]:
            origin, stream, start, count = zip(*spans, strict=True)
            request = ReadRequest(life=page.life, origin=origin, stream=stream, start=start, count=count)
            return list(stub.Read(request, **who).rows)

        assert ask((0, 0, 0, 5), (0, 0, 198, 5), (9, 0, 0, 5), (0, 1, 10, 5), (0, 0, -3, 5)) == [
            5,
            0,
            0,
            5,
            0,
        ]
        assert refused("Read", ReadRequest(life=page.life, origin=[0])) == "shape"
        assert (
            refused("Read", ReadRequest(life=page.life, origin=[0], stream=[0], start=[0], count=[0]))
            == "shape"
        )
        long = ReadRequest(life=page.life, origin=[0], stream=[0], start=[0], count=[(1 << 32) - 1])
        assert refused("Read", long) == "size"
        assert refused("Flags", FlagsRequest(life=page.life, count=0)) == "size"
        assert refused("Flags", FlagsRequest(life=page.life, count=(1 << 20) + 1)) == "size"
        assert not stub.Flags(FlagsRequest(life=page.life, start=198, count=5), **who).found

        def patch(column: str, data: bytes, start: int = 0) -> WriteBackRequest:
            rows = OverlayRows(origin=0, stream=0, start=start, column=column, data=data)
            return WriteBackRequest(life=page.life, patches=[rows])

        assert refused("WriteBack", patch("reward", bytes(4))) == "columns"
        assert refused("WriteBack", patch("latent", bytes(3))) == "shape"
        assert stub.WriteBack(patch("latent", bytes(40), start=195), **who).written == 5
        assert stub.WriteBack(patch("latent", bytes(40), start=-5), **who).written == 5
        assert stub.WriteBack(patch("latent", b""), **who).written == 0
