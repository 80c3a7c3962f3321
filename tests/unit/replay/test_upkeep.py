"""The quiet work of a shard: sealing, eviction by bytes and age, flushing, stages that fail."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from bench import damage
from replay import layout, seal, synthetic
from replay.layout import StoredSegment, Tier
from replay.recovery import bytes_on_disk
from replay.segment import Segment
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import PreflightError
from system.experience import Chunk, StreamId

TABLE = synthetic.vector_table()


def rows(start: int, count: int, *, env: int = 0, episode_length: int = 50) -> Chunk:
    stream = StreamId(actor=0, env=env)
    return synthetic.rows(TABLE, stream, start, count, episode_length=episode_length)


def open_shard(
    root: Path, capacity_rows: int = 4096, segment_rows: int | None = 128, **more: Any
) -> ReplayShard:
    return ReplayShard(root, 0, TABLE, capacity_rows=capacity_rows, segment_rows=segment_rows, **more)


def segments(root: Path) -> list[Path]:
    return list(layout.segment_paths(layout.shard_dir(root, 0)).values())


def test_full_segments_are_sealed_and_stay_readable_for_everybody(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    for start in range(0, 600, 60):
        shard.append([rows(start, 60)], 5.0)
    assert shard.settle(20.0)
    sealed = [seal.is_sealed(path) for path in segments(tmp_path)]
    assert sealed == [True, True, True, True, False]
    assert [stored.number for stored in shard.sealed()] == [0, 1, 2, 3]
    for path in segments(tmp_path):
        group = zarr.open_group(path, mode="r")
        assert set(group.array_keys()) == {*TABLE.columns, "committed", "_slots", "_check"}
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "vector")}}
        theirs = tensorstore.open(spec, read=True).result().read().result()
        segment = Segment.open(path, TABLE)
        for slot, used in enumerate(segment.committed.tolist()):
            start = int(segment.slots[slot, 2])
            wanted = rows(start, used).columns["vector"] if used else theirs[slot, :0]
            np.testing.assert_array_equal(theirs[slot, :used], wanted)
    shard.close()


def test_a_silent_stream_keeps_no_segment_open_and_goes_on_later(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    shard.append([rows(0, 10, env=1)], 5.0)
    for start in range(0, 1200, 60):
        shard.append([rows(start, 60)], 5.0)
    assert shard.settle(20.0)
    assert seal.is_sealed(segments(tmp_path)[0])
    assert shard.append([rows(5, 20, env=1)], 5.0).committed == 15
    assert damage.read_all(tmp_path, TABLE).numbers[0, 1] == frozenset(range(25))
    shard.close()


def test_many_streams_in_turn_fill_their_slots(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 65_536)
    for start in range(0, 128, 16):
        for env in range(40):
            shard.append([rows(start, 16, env=env)], 5.0)
    assert shard.stats().segments == 40 * 128 / 128
    shard.close()


def test_eviction_keeps_the_disk_within_its_bytes(tmp_path: Path) -> None:
    one = TABLE.row_nbytes * 2048
    shard = open_shard(tmp_path, 1 << 20, 2048, capacity_bytes=5 * one)
    for start in range(0, 40_000, 1000):
        shard.append([rows(start, 1000)], 5.0)
    assert shard.settle(20.0)
    sizes = [bytes_on_disk(path) for path in segments(tmp_path)]
    assert 5 * one - max(sizes) < sum(sizes) <= 5 * one + 2 * max(sizes)
    assert shard.stats().inserted == 40_000
    assert shard.stats().rows < 14_000
    shard.close()
    directory = layout.shard_dir(tmp_path, 0)
    assert list((directory / layout.SCRATCH).iterdir()) == []
    total = sum(p.stat().st_blocks * 512 for p in directory.rglob("*") if p.is_file())
    assert total < 5 * one + 3 * max(sizes)


def test_eviction_by_age_takes_whole_sealed_segments(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, max_age_seconds=1e-6)
    for start in range(0, 600, 60):
        shard.append([rows(start, 60)], 5.0)
    assert shard.settle(20.0)
    assert shard.settle(20.0)
    assert shard.stats().segments == 1  # the one that is being filled
    assert shard.stats().inserted == 600
    shard.close()


def test_a_million_tiny_episodes_and_an_endless_one(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 65_536, None)
    for start in range(0, 1_000_000, 50_000):
        shard.append([rows(start, 50_000, episode_length=1)], 30.0)
        shard.append([rows(start // 10, 5_000, env=1, episode_length=1 << 30)], 30.0)
    assert shard.settle(30.0)
    assert shard.stats().inserted == 1_100_000
    view = TableView(tmp_path, TABLE, 64)
    assert view.settle(20.0)
    assert view.index.rows == shard.stats().rows <= 65_536
    assert view.index.total > 50_000
    view.release()
    shard.close()


def test_flush_writes_down_what_the_device_holds_before_the_acknowledgement(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, durability="flush")
    for start in range(0, 200, 50):
        shard.append([rows(start, 50)], 5.0)
        mark = layout.read_json(layout.shard_dir(tmp_path, 0) / "flushed.json")
        assert mark is not None
        for name, committed in mark["committed"].items():
            path = layout.shard_dir(tmp_path, 0) / name
            assert np.fromfile(path / "committed/c/0", "<i8").tolist() == committed
        assert max(map(max, mark["committed"].values())) > 0
    shard.close()


def test_interval_flushes_in_the_background(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, durability="interval", flush_seconds=0.01)
    shard.append([rows(0, 50)], 5.0)
    deadline = time.monotonic() + 20.0
    mark = layout.shard_dir(tmp_path, 0) / "flushed.json"
    while not mark.exists() and time.monotonic() < deadline:
        pass
    assert layout.read_json(mark)
    shard.close()


class _Broken:
    """A stage whose disk is full."""

    name = "broken"

    def pick(self, sealed: Sequence[StoredSegment]) -> StoredSegment | None:
        return sealed[0] if sealed else None

    def work(self, segment: StoredSegment, scratch: Path) -> tuple[Path, Tier] | None:
        raise PreflightError("disk full")


def test_a_stage_that_fails_holds_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = open_shard(tmp_path, stages=[_Broken()])
    for start in range(0, 600, 60):
        shard.append([rows(start, 60)], 5.0)
    assert shard.settle(20.0)
    assert len(shard.sealed()) == 4
    assert "stage failed" in caplog.text
    shard.close()
