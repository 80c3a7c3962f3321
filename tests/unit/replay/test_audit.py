"""The audit finds what was planted, and nothing in a replay that is sound."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from replay import layout, synthetic
from replay.audit import ReplayBooks, audit_replay
from replay.segment import Segment
from replay.shard import ReplayShard
from system.errors import IntegrityError, SchemaError
from system.experience import Chunk, StreamId

TABLE = synthetic.vector_table()
STREAMS = [StreamId(actor=0, env=0), StreamId(actor=1, env=2)]
ROWS = 150


def fill(
    root: Path, *, index: int = 0, rows: int = ROWS, capacity: int = 4096, streams: list[StreamId] = STREAMS
) -> None:
    shard = ReplayShard(root, index, TABLE, capacity_rows=capacity)
    for start in range(0, rows, 10):
        shard.append([synthetic.rows(TABLE, s, start, min(10, rows - start)) for s in streams], 5.0)
    shard.close()


def tamper(root: Path, change: Callable[[Segment], None]) -> ReplayBooks:
    """Change the oldest segment of shard 0 behind the shard's back, then audit."""
    path = next(iter(layout.segment_paths(layout.shard_dir(root, 0)).values()))
    change(Segment.open(path, TABLE, writable=True))
    return audit_replay(root)


def kinds(books: ReplayBooks) -> set[str]:
    return {finding.kind for finding in books.findings}


def test_sound_replay_balances(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path, index=1, streams=[StreamId(actor=2, env=0)], rows=40)
    books = audit_replay(tmp_path)
    assert books.findings == ()
    assert (books.shards, books.inserted, books.live, books.evicted) == (2, 340, 340, 0)
    assert books.rows == {
        (STREAMS[0], 0): 150, (STREAMS[1], 0): 150, (StreamId(actor=2, env=0), 0): 40,
    }  # fmt: skip


def test_lives_of_a_stream_are_counted_apart(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=4096)
    stream = STREAMS[0]
    shard.append([synthetic.rows(TABLE, stream, 0, 33, incarnation=1)], 5.0)
    # Versions of the synthetic rows follow the row number: the second life begins where the first stopped.
    shard.append([newer(synthetic.rows(TABLE, stream, 0, 20, incarnation=4))], 5.0)
    shard.close()
    books = audit_replay(tmp_path)
    assert books.findings == ()
    assert books.rows == {(stream, 1): 33, (stream, 4): 20}
    assert books.whole_from == {stream: 0}


def newer(chunk: Chunk) -> Chunk:
    columns = {**chunk.columns, "policy_version": np.full(len(chunk), 99, np.int64)}
    return Chunk(stream=chunk.stream, columns=columns)


def test_evicted_rows_are_accounted_for(tmp_path: Path) -> None:
    fill(tmp_path, rows=600, capacity=512)
    books = audit_replay(tmp_path)
    assert books.findings == ()
    assert books.evicted > 0
    assert books.live + books.evicted == books.inserted == 1200
    assert set(books.whole_from.values()) == {1}  # nothing is whole before the next incarnation


def test_life_that_begins_where_eviction_stopped_is_whole(tmp_path: Path) -> None:
    stream = STREAMS[0]
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=512)
    for start in range(0, 64, 16):  # one whole segment of one slot
        shard.append([synthetic.rows(TABLE, stream, start, 16)], 5.0)
    for start in range(0, 512, 16):
        shard.append([newer(synthetic.rows(TABLE, stream, start, 16, incarnation=2))], 5.0)
    shard.close()
    books = audit_replay(tmp_path)
    assert books.findings == ()
    assert books.rows == {(stream, 2): 512}
    assert books.whole_from == {stream: 2}


def test_audit_beside_a_live_shard_balances(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    for start in range(0, 2000, 25):
        shard.append([synthetic.rows(TABLE, STREAMS[0], start, 25)], 5.0)
        books = audit_replay(tmp_path)
        assert books.findings == ()
        assert books.inserted == start + 25
    shard.close()


def test_row_stored_twice_is_found(tmp_path: Path) -> None:
    fill(tmp_path)

    def double(segment: Segment) -> None:
        for array in segment.columns.values():
            array[0, 21] = array[0, 20]

    books = tamper(tmp_path, double)
    assert books.rows_of("doubled") == 1
    assert books.rows_of("missing") == 1


def test_missing_rows_inside_a_stream_are_found(tmp_path: Path) -> None:
    fill(tmp_path)

    def drop(segment: Segment) -> None:
        for array in segment.columns.values():
            array[0, 20:61] = array[0, 23:64]
        segment.committed[0] = 61

    books = tamper(tmp_path, drop)
    assert books.rows_of("missing") >= 3
    assert "doubled" not in kinds(books)


def test_commit_word_turned_back_is_found(tmp_path: Path) -> None:
    fill(tmp_path)

    def turn_back(segment: Segment) -> None:
        segment.committed[0] = 7

    books = tamper(tmp_path, turn_back)
    assert any("do not meet" in finding.what for finding in books.findings)


def test_lost_newest_rows_are_found_by_the_catalog(tmp_path: Path) -> None:
    fill(tmp_path, rows=20)

    def cut(segment: Segment) -> None:
        segment.committed[:] = [min(n, 15) for n in segment.committed.tolist()]

    assert tamper(tmp_path, cut).rows_of("missing") == 10


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [("vector", np.nan, "NaN"), ("direction", 7, "0..3"), ("is_terminal", True, "is_terminal")],
)
def test_rows_that_would_not_be_admitted_are_torn(
    tmp_path: Path, column: str, value: float, says: str
) -> None:
    fill(tmp_path)

    def tear(segment: Segment) -> None:
        segment.columns[column][0, 5] = value

    books = tamper(tmp_path, tear)
    assert kinds(books) == {"torn"}
    assert says in books.findings[0].what


def test_policy_version_that_goes_back_is_found(tmp_path: Path) -> None:
    fill(tmp_path)

    def turn_back(segment: Segment) -> None:
        segment.columns["policy_version"][0, 30] = 0

    assert kinds(tamper(tmp_path, turn_back)) == {"version"}


def test_older_life_after_a_newer_one_is_found(tmp_path: Path) -> None:
    fill(tmp_path)

    def reborn(segment: Segment) -> None:
        segment.columns["incarnation"][0, :40] = 3

    assert "order" in kinds(tamper(tmp_path, reborn))


def test_damaged_segment_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    path = next(iter(layout.segment_paths(layout.shard_dir(tmp_path, 0)).values()))
    data = next((path / "vector" / "c").rglob("0/0/0"))
    data.write_bytes(data.read_bytes()[:-100])
    books = audit_replay(tmp_path)
    assert "damaged" in kinds(books)
    assert any("must have" in finding.what for finding in books.findings)


def test_lost_oldest_segment_is_found_by_the_ledger(tmp_path: Path) -> None:
    fill(tmp_path, rows=600)
    first = next(iter(layout.segment_paths(layout.shard_dir(tmp_path, 0)).values()))
    layout.remove((first, layout.overlay_path(first)))
    assert "ledger" in kinds(audit_replay(tmp_path))


def test_a_row_in_two_shards_is_found(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path, index=1, streams=STREAMS[:1], rows=10)
    books = audit_replay(tmp_path)
    (finding,) = books.findings
    assert (finding.kind, finding.rows) == ("doubled", 10)
    assert "stored at both" in finding.what


def test_a_stream_that_moved_between_shards_balances(tmp_path: Path) -> None:
    def append(index: int, start: int, count: int) -> None:
        shard = ReplayShard(tmp_path, index, TABLE, capacity_rows=4096)
        chunk = synthetic.rows(TABLE, STREAMS[0], start, count)
        shard.append([replace(chunk, continues=start > 0)], 5.0)
        shard.close()

    append(0, 0, 33)
    append(1, 40, 20)  # rows 33..39 were lost on the way
    append(0, 60, 30)
    books = audit_replay(tmp_path)
    assert books.findings == ()
    assert books.rows == {(STREAMS[0], 0): 83}
    assert books.live == 83


def test_place_without_a_replay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="no replay table"):
        audit_replay(tmp_path)


def test_table_that_is_no_schema_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, rows=10)
    (tmp_path / "table.json").write_text('{"format": 2, "table": {"columns": 3}, "digest": ""}')
    with pytest.raises(IntegrityError, match="must have the entries"):
        audit_replay(tmp_path)
