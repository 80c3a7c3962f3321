"""The shard on the wire: roles, bytes nobody should send, restarts, grants that must always get through."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import numpy as np
import pytest

from replay import synthetic
from replay.client import GrpcReplayWriter, GrpcShardControl
from replay.experience_pb2 import AppendRequest, GrantRequest
from replay.experience_pb2_grpc import ReplayServiceStub
from replay.messages import MESSAGE_BYTES, RowCodec
from replay.service import ShardServer, serve_shard
from replay.shard import ReplayShard
from system.errors import DeadlineError, RejectedError, SchemaError
from system.experience import Chunk, StreamId
from system.wire import call_metadata, error_of, open_channel

TABLE = synthetic.vector_table()


def rows(start: int, count: int, *, env: int = 0) -> Chunk:
    return synthetic.rows(TABLE, StreamId(actor=0, env=env), start, count)


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[ReplayShard]:
    with closing(ReplayShard(tmp_path, 0, TABLE, capacity_rows=4096)) as shard:
        yield shard


@pytest.fixture
def server(shard: ReplayShard) -> Iterator[ShardServer]:
    server = serve_shard(shard, "127.0.0.1:0")
    yield server
    server.stop(0)


def refusal(
    server: ShardServer, request: AppendRequest, role: str = "actor", timeout: float | None = 5.0
) -> str:
    """The reason a hand-made append is refused for."""
    with open_channel(server.address) as channel:
        stub = ReplayServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failed:
            stub.Append(iter([request]), timeout=timeout, metadata=call_metadata(role))
        error = error_of(failed.value, "shard")
        assert isinstance(error, RejectedError), error
        return error.reason


def message(**changes: object) -> AppendRequest:
    """Ten sound rows; `changes` are columns to send instead, or fields of the message."""
    columns = dict(rows(0, 10).columns)
    columns |= {name: value for name, value in changes.items() if name in columns}
    (encoded,) = RowCodec(TABLE).encode([Chunk(stream=StreamId(actor=0, env=0), columns=columns)])
    request = AppendRequest.FromString(encoded)
    fields = {field.name: getattr(request, field.name) for field in request.DESCRIPTOR.fields}
    return AppendRequest(**(fields | {k: v for k, v in changes.items() if k in fields}))


def test_roles_do_only_what_is_theirs(shard: ReplayShard, server: ShardServer) -> None:
    for role in ("learner", "driver", "", "nobody"):
        assert refusal(server, message(), role) == "role"
    with closing(GrpcShardControl(server.address, role="actor")) as control:
        with pytest.raises(RejectedError, match="may not read statistics"):
            control.stats()
        with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as failed:
            ReplayServiceStub(channel).Grant(
                GrantRequest(max_inserted=1), timeout=5.0, metadata=call_metadata("actor")
            )
        assert failed.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert shard.stats().inserted == 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (message(schema="0" * 64), "schema"),
        (message(payload=message().payload[:-1]), "shape"),
        (message(payload=b""), "shape"),
        (message(rows=[]), "shape"),
        (message(rows=[10, 0], actor=[0, 0], env=[0, 1]), "shape"),
        (message(rows=[(1 << 32) - 1]), "shape"),
        (message(actor=[1 << 20]), "range"),
        (message(is_first=np.full(10, 2, np.uint8)), "range"),
        (message(vector=np.full((10, 4), np.nan, np.float32)), "nonfinite"),
        (message(step=np.zeros(10, np.int32), is_first=np.ones(10, np.bool_)), "identity"),
        (message(rows=[4, 6], actor=[0, 0], env=[0, 1]), "incarnation"),
    ],
)
def test_bytes_that_are_no_rows_are_refused_and_counted(
    shard: ReplayShard, server: ShardServer, request_: AppendRequest, reason: str
) -> None:
    assert refusal(server, request_) == reason
    stats = shard.stats()
    assert stats.inserted == (4 if reason == "incarnation" else 0)  # only the sound first chunk of that one
    assert stats.inserted + stats.rejected == min(sum(request_.rows), len(request_.payload))


def test_an_append_without_a_deadline_is_refused(server: ShardServer) -> None:
    assert refusal(server, message(), timeout=None) == "deadline"


def test_statistics_travel_whole(shard: ReplayShard, server: ShardServer) -> None:
    shard.append([rows(0, 100), rows(0, 20, env=3)], 5.0)
    shard.append([rows(0, 100)], 5.0)
    with closing(GrpcShardControl(server.address)) as control:
        assert control.stats() == shard.stats()
        assert control.stats().duplicates == 100


def test_long_appends_are_cut_into_bounded_messages() -> None:
    table = synthetic.image_table()
    chunks = [synthetic.rows(table, StreamId(actor=0, env=e), 0, 200) for e in range(2)]
    codec = RowCodec(table)
    messages = list(codec.encode(chunks))
    assert len(messages) == 3
    assert all(len(m) < MESSAGE_BYTES + (64 << 10) for m in messages)
    batches = [codec.decode(AppendRequest.FromString(m)) for m in messages]
    for env in range(2):
        for name, values in chunks[env].columns.items():
            parts = [c.columns[name] for b in batches for c in b.chunks if c.stream.env == env]
            np.testing.assert_array_equal(np.concatenate(parts), values)


def test_wrong_columns_fail_at_the_sender(server: ShardServer) -> None:
    chunk = rows(0, 10)
    wrong = Chunk(stream=chunk.stream, columns={**chunk.columns, "vector": np.zeros((10, 5), np.float32)})
    with (
        closing(GrpcReplayWriter(server.address, TABLE)) as writer,
        pytest.raises(SchemaError, match="vector"),
    ):
        writer.append([wrong], 5.0)


def test_a_writer_outlives_a_restart_of_its_shard(tmp_path: Path) -> None:
    root = tmp_path / "r"
    with ExitStack() as stack:
        shard = ReplayShard(root, 0, TABLE, capacity_rows=4096)
        server = serve_shard(shard, "127.0.0.1:0")
        writer = stack.enter_context(closing(GrpcReplayWriter(server.address, TABLE)))
        writer.append([rows(0, 50)], 5.0)
        server.stop(0)
        shard.close()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        pending = pool.submit(writer.append, [rows(20, 50)], 30.0)
        shard = stack.enter_context(closing(ReplayShard(root, 0, TABLE, capacity_rows=4096)))
        server = serve_shard(shard, server.address)
        stack.callback(server.stop, 0)
        ack = pending.result()
        assert (ack.committed, ack.duplicates) == (20, 30)


def test_a_shard_that_is_not_there_is_a_missed_deadline() -> None:
    with (
        closing(GrpcReplayWriter("127.0.0.1:1", TABLE)) as writer,
        pytest.raises(DeadlineError, match=":1 did"),
    ):
        writer.append([rows(0, 5)], 0.2)
    with closing(GrpcShardControl("127.0.0.1:1")) as control:
        with pytest.raises(DeadlineError):
            control.stats()
        control.grant(5)
        with pytest.raises(DeadlineError):  # the failure of a grant shows at a later one
            grant_until_failure(control)


def grant_until_failure(control: GrpcShardControl) -> None:
    while True:
        control.grant(5)


def test_grants_get_through_while_appends_fill_the_server(tmp_path: Path) -> None:
    with ExitStack() as stack:
        shard = stack.enter_context(
            closing(ReplayShard(tmp_path, 0, TABLE, capacity_rows=4096, initial_grant=0))
        )
        server = ShardServer(shard, "127.0.0.1:0", workers=6)  # two for appends
        stack.callback(server.stop, 0)
        pool = stack.enter_context(ThreadPoolExecutor(5))
        writers = [stack.enter_context(closing(GrpcReplayWriter(server.address, TABLE))) for _ in range(5)]
        sent = [pool.submit(w.append, [rows(0, 10, env=e)], 30.0) for e, w in enumerate(writers)]
        control = stack.enter_context(closing(GrpcShardControl(server.address)))
        while control.stats().waiting < 20:
            pass
        control.grant(50)
        assert [s.result().committed for s in sent] == [10] * 5
        assert shard.stats().inserted == 50
