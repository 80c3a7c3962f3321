from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import synthetic
from replay.admission import Cursor, check_chunk, rows_known, stream_key, stream_of
from system.errors import RejectedError
from system.experience import Chunk, StreamId

TABLE = synthetic.vector_table()
STREAM = StreamId(actor=3, env=2)


def good(**changes: Any) -> Chunk:
    chunk = synthetic.rows(TABLE, STREAM, 45, 10)  # an episode ends inside
    columns = {**chunk.columns, **changes}
    return Chunk(stream=STREAM, columns={k: v for k, v in columns.items() if v is not None})


def changed(name: str, row: int, value: Any) -> np.ndarray:
    column = good().columns[name].copy()
    column[row] = value
    return column


def test_good_rows_pass() -> None:
    check_chunk(TABLE, good())


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (good(vector=None), "columns"),
        (good(extra=np.zeros(10)), "columns"),
        (good(vector=good().columns["vector"].astype(np.float64)), "dtype"),
        (good(vector=good().columns["vector"].astype(">f4")), "dtype"),
        (good(vector=good().columns["vector"][:, :3]), "shape"),
        (good(action=good().columns["action"][:9]), "shape"),
        (good(reward=np.float32(1.0).reshape(())), "shape"),
        (good(vector=changed("vector", 4, np.nan)), "nonfinite"),
        (good(reward=changed("reward", 0, np.inf)), "nonfinite"),
        (good(direction=changed("direction", 2, 4)), "range"),
        (good(direction=changed("direction", 2, -1)), "range"),
        (good(action=changed("action", 2, -1)), "range"),
        (good(incarnation=np.full(10, -1, np.int32)), "range"),
        (good(is_last=good().columns["is_last"].view(np.uint8) * 2), "dtype"),
        (good(is_last=(good().columns["is_last"].view(np.uint8) * 2).view(np.bool_)), "range"),
        (good(is_terminal=changed("is_terminal", 0, True)), "flags"),
        (good(is_first=changed("is_first", 0, True)), "flags"),
        (good(is_first=changed("is_first", 5, False)), "flags"),
        (good(step=changed("step", 2, 9)), "identity"),
        (good(episode=changed("episode", 9, 7)), "identity"),
        (good(incarnation=changed("incarnation", 9, 7)), "identity"),
        (good(is_last=changed("is_last", 4, False), is_terminal=np.zeros(10, bool)), "identity"),
        (Chunk(stream=StreamId(actor=-1, env=0), columns=good().columns), "range"),
        (Chunk(stream=StreamId(actor=0, env=1 << 16), columns=good().columns), "range"),
    ],
)
def test_bad_rows_are_refused_with_their_reason(chunk: Chunk, reason: str) -> None:
    with pytest.raises(RejectedError) as refused:
        check_chunk(TABLE, chunk)
    assert refused.value.reason == reason
    assert ";" in str(refused.value) or "must" in str(refused.value)


def test_an_empty_chunk_is_refused() -> None:
    chunk = synthetic.rows(TABLE, STREAM, 0, 0)
    with pytest.raises(RejectedError, match="no rows"):
        check_chunk(TABLE, chunk)


def test_stream_keys_are_invertible_and_fit_an_int32() -> None:
    for stream in (StreamId(actor=0, env=0), StreamId(actor=32_767, env=65_535), STREAM):
        assert stream_of(stream_key(stream)) == stream
        assert np.int32(stream_key(stream)) == stream_key(stream)


@given(
    stored=st.integers(1, 200),
    start=st.integers(0, 250),
    count=st.integers(1, 80),
    episode=st.integers(2, 60),
)
def test_known_rows_are_exactly_those_up_to_the_cursor(
    stored: int, start: int, count: int, episode: int
) -> None:
    past = synthetic.rows(TABLE, STREAM, 0, stored, episode_length=episode)
    cursor = Cursor.after(past.columns, stored - 1, stored)
    chunk = synthetic.rows(TABLE, STREAM, start, count, episode_length=episode)
    if start > stored:
        with pytest.raises(RejectedError) as refused:
            rows_known(cursor, 0, chunk)
        assert refused.value.reason == "gap"
    else:
        assert rows_known(cursor, 0, chunk) == min(count, stored - start)


def test_a_repeat_that_disagrees_about_where_the_episode_ended_is_a_gap() -> None:
    past = synthetic.rows(TABLE, STREAM, 0, 30, episode_length=50)
    cursor = Cursor.after(past.columns, 29, 30)
    other = synthetic.rows(TABLE, STREAM, 15, 30, episode_length=20)
    with pytest.raises(RejectedError) as refused:
        rows_known(cursor, 0, other)
    assert refused.value.reason == "gap"
