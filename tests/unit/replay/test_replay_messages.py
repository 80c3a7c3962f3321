"""Bytes of appends: what arrives is refused with a reason, or is what its chunks alone would have brought."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay import synthetic
from replay.admission import all_sound, check_chunk
from replay.experience_pb2 import AppendRequest
from replay.messages import RowBatch, RowCodec, rows_claimed
from replay.shard import ReplayShard
from system.errors import RejectedError
from system.experience import Chunk, StreamId
from system.specs import TableSpec

TABLE = synthetic.vector_table()
CODEC = RowCodec(TABLE)
STREAMS = [StreamId(actor=0, env=e) for e in range(3)]
CHUNKS = [synthetic.rows(TABLE, s, 0, n, episode_length=7) for s, n in zip(STREAMS, (9, 1, 20), strict=True)]
(ENCODED,) = CODEC.encode(CHUNKS)


def decode(data: bytes) -> RowBatch:
    return CODEC.decode(AppendRequest.FromString(data))


def sound_one_by_one(batch: RowBatch) -> bool:
    try:
        for chunk in batch.chunks:
            check_chunk(TABLE, chunk)
    except RejectedError:
        return False
    return True


def test_encoding_by_hand_is_what_protobuf_makes() -> None:
    request = AppendRequest.FromString(ENCODED)
    assert request.SerializeToString() == ENCODED
    assert (list(request.env), list(request.rows)) == ([0, 1, 2], [9, 1, 20])


def test_columns_come_back_whole_and_aligned() -> None:
    batch = decode(ENCODED)
    assert [c.stream for c in batch.chunks] == STREAMS
    for chunk, back in zip(CHUNKS, batch.chunks, strict=True):
        assert list(back.columns) == list(TABLE.all)
        for name, values in chunk.columns.items():
            np.testing.assert_array_equal(back.columns[name], values)
            assert back.columns[name].flags.aligned


def test_the_payload_does_not_depend_on_the_order_in_which_a_schema_names_its_columns() -> None:
    again = TableSpec.from_json(TABLE.to_json())
    assert list(again.all) != list(TABLE.all)
    assert list(RowCodec(again).encode(CHUNKS)) == [ENCODED]


def test_many_chunks_are_judged_at_once_as_one_by_one() -> None:
    def damage(name: str, row: int, value: object) -> Callable[[], RowBatch]:
        def make() -> RowBatch:
            columns = {k: v.copy() for k, v in CHUNKS[2].columns.items()}
            columns[name][row] = value
            return decode(next(CODEC.encode([*CHUNKS[:2], Chunk(stream=STREAMS[2], columns=columns)])))

        return make

    for row in (0, 6, 7, 12, 19):
        for name, value in (
            ("vector", np.inf), ("reward", np.nan), ("direction", 4), ("direction", -1), ("action", -1),
            ("step", 99), ("step", -1), ("episode", 5), ("incarnation", 1), ("incarnation", -1),
            ("is_first", None), ("is_last", None), ("is_terminal", None),
        ):  # fmt: skip
            old = CHUNKS[2].columns[name][row]
            batch = damage(name, row, not old if value is None else value)()
            alone = sound_one_by_one(batch)
            assert all_sound(TABLE, batch.chunks, batch.columns, batch.ends) == alone, (name, row)
    whole = decode(ENCODED)
    assert all_sound(TABLE, whole.chunks, whole.columns, whole.ends)


@pytest.fixture
def shard(tmp_path: Path) -> object:
    with closing(ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)) as shard:
        yield shard


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert"]), st.integers(0, len(ENCODED) - 1), st.integers(0, 255)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_no_mutated_message_is_accepted_that_its_chunks_alone_would_not_be(
    shard: ReplayShard, edits: list[tuple[str, int, int]]
) -> None:
    data = bytearray(ENCODED)
    for kind, at, value in edits:
        at = min(at, len(data) - 1)
        if kind == "set":
            data[at] = value
        elif kind == "cut":
            del data[at : at + 1 + value]
        else:
            data[at:at] = bytes([value])
        data = data or bytearray(1)
    before = shard.stats().inserted
    try:
        message = AppendRequest.FromString(bytes(data))
        assert rows_claimed(message) <= len(data)
        batch = CODEC.decode(message)
    except (DecodeError, RejectedError):
        return
    sound = all_sound(TABLE, batch.chunks, batch.columns, batch.ends)
    assert sound == sound_one_by_one(batch)
    try:
        shard.append(batch.chunks, 5.0, sound=sound)
    except RejectedError:
        return
    assert sound
    assert shard.stats().inserted - before <= len(batch.columns["reward"])


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=400))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises((DecodeError, RejectedError)):
        decode(data)
