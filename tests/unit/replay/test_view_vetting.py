"""Before rows can be drawn: segments are vetted, and looked at whether they are in memory."""

import contextlib
import errno
import functools
import gc
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from replay import follow, layout, synthetic
from replay.batch_spec import BatchSpec
from replay.follow import MappedShard
from replay.index import StartIndex
from replay.limiter import RateLimiter
from replay.raw import MappedSegment, open_raw
from replay.reader import LocalReader
from replay.rows import Home, RowViews
from replay.segment import data_path
from replay.selection import Sampling
from replay.shard import ReplayShard
from replay.vetting import Vetting
from replay.view import TableView
from replay.vouching import last_verified, read_verified
from system.experience import StreamId
from system.metrics import Metrics

TABLE = synthetic.vector_table()
STREAM = StreamId(actor=0, env=0)


def append(shard: ReplayShard, start: int, count: int) -> None:
    assert shard.append([synthetic.rows(TABLE, STREAM, start, count)], 5.0).committed == count


def filled(root: Path, rows: int = 300) -> None:
    """A shard of one stream, closed again."""
    shard = ReplayShard(root, 0, TABLE, capacity_rows=1024)
    for start in range(0, rows, 20):
        append(shard, start, min(20, rows - start))
    shard.close()


def check_rows(index: StartIndex[Home]) -> int:
    """Copy every live row and compare it with what was sent; return how many."""
    runs, seen = index.stream(0, 0), 0
    for lo, hi in runs.bounds:
        sent = synthetic.rows(TABLE, STREAM, lo, hi - lo).columns
        got = {name: np.zeros((hi - lo, *spec.shape), spec.dtype) for name, spec in TABLE.all.items()}
        at = 0
        for piece in runs.pieces(lo, hi - lo):
            piece.home.copy_rows(RowViews(got), at, piece.first, piece.rows)
            at += piece.rows
        assert all(np.array_equal(got[name], sent[name]) for name in TABLE.columns)
        seen += at
    return seen


def test_what_is_not_vetted_yet_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 600)
    monkeypatch.setattr(follow, "AT_ONCE_NBYTES", 0)
    view = TableView(tmp_path, TABLE, 5)
    assert view.settle(20.0)
    assert view.unvetted == 0
    assert check_rows(view.index) == 600
    view.release()


def test_the_word_of_an_earlier_owner_is_not_believed_while_the_next_one_opens(tmp_path: Path) -> None:
    filled(tmp_path)
    with contextlib.closing(ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)) as owner:
        assert owner.settle(20.0)
    directory = layout.shard_dir(tmp_path, 0)
    assert last_verified(directory)
    file = data_path(layout.segment_paths(directory)[0], "vector", 3)
    raw = bytearray(file.read_bytes())
    raw[70 * TABLE.columns["vector"].nbytes] ^= 1
    file.write_bytes(raw)
    with layout.take_lock(directory):  # as an owner that has verified nothing yet
        view = TableView(tmp_path, TABLE, 1)
        assert check_rows(view.index) == 300 - 128
        view.release()


def test_the_word_of_the_owner_is_believed(tmp_path: Path) -> None:
    owner = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    append(owner, 0, 30)
    assert owner.settle(20.0)
    directory = layout.shard_dir(tmp_path, 0)
    assert read_verified(directory) == {path.name for path in layout.segment_paths(directory).values()}
    owner.close()
    assert read_verified(directory) is None


def test_rows_appended_while_their_segment_is_vetted_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "AT_ONCE_NBYTES", 0)
    monkeypatch.setattr(follow, "read_verified", lambda _: None)
    owner = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    append(owner, 0, 30)
    vetting, release = Vetting(), threading.Event()
    vetting.submit(99, lambda: np.full(1, release.wait(10.0), np.int64))
    index: StartIndex[Home] = StartIndex(5)
    _, replay_id = layout.read_table(tmp_path)
    shard = MappedShard(layout.shard_dir(tmp_path, 0), 0, TABLE, vetting, replay_id=replay_id)
    shard.refresh(index)
    assert (shard.unvetted, index.rows) == (1, 0)
    append(owner, 30, 20)
    release.set()
    assert vetting.settle(10.0)
    shard.refresh(index)
    assert (shard.unvetted, check_rows(index)) == (0, 50)
    shard.release(index)
    owner.close()


def test_the_newest_segments_are_vetted_first() -> None:
    vetting, first, release, order = Vetting(), threading.Event(), threading.Event(), []

    def block() -> np.ndarray:
        first.set()
        release.wait(10.0)
        return np.zeros(1, np.int64)

    def note(number: int) -> Callable[[], np.ndarray]:
        return lambda: order.append(number) or np.zeros(1, np.int64)

    verdicts = [vetting.submit(99, block)]
    assert first.wait(10.0)
    verdicts += [vetting.submit(number, note(number)) for number in (4, 7, 1, 9)]
    assert vetting.waiting == 4
    release.set()
    assert vetting.settle(10.0)
    assert order == [9, 7, 4, 1]
    assert all(verdict.done for verdict in verdicts)


def test_an_error_in_vetting_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)

    def broken(_: object) -> np.ndarray:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("replay.raw.MappedSegment.good_rows", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        TableView(tmp_path, TABLE, 5)


def test_a_table_is_distant_while_its_pages_are_not_in_memory() -> None:
    table = synthetic.image_table(size=32)
    with tempfile.TemporaryDirectory() as name:  # a disk, if there is one; tmp_path is memory
        shard = ReplayShard(Path(name), 0, table, capacity_rows=4096)
        shard.append([synthetic.rows(table, StreamId(actor=0, env=0), 0, 300)], 5.0)
        shard.flush()
        shard.close()
        del shard
        gc.collect()  # mapped pages stay
        for path in filter(Path.is_file, Path(name).rglob("*")):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        homes = [
            open_raw(path, table) for path in layout.segment_paths(layout.shard_dir(Path(name), 0)).values()
        ]
        if not any(home.distant for home in homes):
            pytest.skip("the page cache of this file system cannot be emptied")
        for home in homes:
            for column in home.views.columns.values():
                column.sum()
        assert not any(home.distant for home in homes)


def test_a_segment_that_cannot_be_read_now_is_left_out_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    directory = layout.shard_dir(tmp_path, 0)
    bad = layout.segment_paths(directory)[1]
    sound = MappedSegment.good_rows

    def good_rows(home: MappedSegment) -> np.ndarray:
        if home.segment.path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return sound(home)

    metrics = Metrics("run", "learner", 0)
    with monkeypatch.context() as patched:
        patched.setattr(MappedSegment, "good_rows", good_rows)
        view = TableView(tmp_path, TABLE, 5, metrics=metrics)
        view.refresh()
    assert check_rows(view.index) == 300 - 128
    assert metrics.value("replay_segments_skipped_total", reason="unreadable") == 1
    now = time.monotonic()
    monkeypatch.setattr("replay.follow.time.monotonic", lambda: now + 2 * follow.AGAIN_SECONDS)
    view.refresh()
    assert check_rows(view.index) == 300
    view.release()


@pytest.mark.parametrize("wrong", [-1, -(1 << 62), 1 << 40, 129])
def test_a_slot_whose_counter_says_what_cannot_be_keeps_its_rows(tmp_path: Path, wrong: int) -> None:
    owner, metrics = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024), Metrics("run", "learner", 0)
    append(owner, 0, 30)
    view = TableView(tmp_path, TABLE, 5, metrics=metrics)
    (path,) = layout.segment_paths(layout.shard_dir(tmp_path, 0)).values()
    counters = np.memmap(data_path(path, "committed", 1), np.int64, "r+")
    free = int(np.flatnonzero(counters == 0)[0])
    for slot, count in ((0, wrong), (free, 1)):  # a slot without a stream has no row
        sound, counters[slot] = int(counters[slot]), count
        for _ in range(3):
            view.refresh()
            assert check_rows(view.index) == 30
        counters[slot] = sound
    assert metrics.value("replay_counters_refused_total", counter="committed") == 2
    append(owner, 30, 20)
    view.refresh()
    assert check_rows(view.index) == 50
    view.release()
    owner.close()


def test_windows_of_rows_that_are_checked_late_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader resumed beside many unchecked segments draws every new window once all the same."""
    spec = BatchSpec(batch=4, length=8, context=0)
    open_reader = functools.partial(
        LocalReader,
        tmp_path,
        TABLE,
        spec=spec,
        seed=0,
        limiter=RateLimiter(1.0, 10, 1 << 20, 10),
        controls=[],
        sampling=Sampling(shares={"online": 1}),
    )
    owner = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    append(owner, 0, 20)
    reader = open_reader()
    for start in range(20, 380, 20):
        append(owner, start, 20)
    reader.sample(5.0)
    state = json.loads(json.dumps(reader.state()))
    reader.close()
    owner.close()
    monkeypatch.setattr(follow, "AT_ONCE_NBYTES", 0)
    sound = MappedSegment.good_rows
    released = threading.Event()

    def slowly(home: MappedSegment) -> np.ndarray:
        if home.segment.number == 0:
            released.wait(10.0)
        return sound(home)

    monkeypatch.setattr(MappedSegment, "good_rows", slowly)
    reader = open_reader()
    threading.Timer(0.2, released.set).start()
    reader.load(state)
    drawn = [start for _ in range(11) for start in reader.sample(5.0).ids.start.tolist()]
    assert drawn[:40] == list(range(52, 372, 8))
    reader.close()


@pytest.mark.parametrize(
    "about", ['{"capacity_row": 4096}', '{"capacity_rows": "x", "slots": 1, "rows": 1}', "[", "{}"]
)
def test_a_damaged_description_of_a_shard_tells_no_capacity(tmp_path: Path, about: str) -> None:
    table = synthetic.vector_table()
    ReplayShard(tmp_path, 0, table, capacity_rows=1024).close()
    (layout.shard_dir(tmp_path, 0) / "shard.json").write_text(about)
    view = TableView(tmp_path, table, 1)
    assert view.capacities() == []
    view.release()
