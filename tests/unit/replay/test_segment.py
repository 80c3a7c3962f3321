"""A live segment is a valid Zarr v3 group for everybody, at every instant."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from replay import layout, synthetic
from replay.geometry import CHUNK_ROWS, TARGET_BYTES, choose_geometry
from replay.shard import ReplayShard
from system.experience import StreamId
from system.specs import TableSpec

IMAGES = synthetic.image_table(size=8)
VECTORS = synthetic.vector_table()


@pytest.mark.parametrize("row_nbytes", [20, 300, 12_500, 2_000_000])
@pytest.mark.parametrize("capacity", [128, 1000, 100_000, 5_000_000])
def test_geometry_stays_within_its_bounds(row_nbytes: int, capacity: int) -> None:
    it = choose_geometry(row_nbytes, capacity)
    assert it.rows % CHUNK_ROWS == 0
    assert it.total == it.slots * it.rows
    assert it.total <= max(CHUNK_ROWS, capacity // 8)
    assert it.total * row_nbytes <= max(TARGET_BYTES, CHUNK_ROWS * row_nbytes)
    assert 2 * it.total > min(TARGET_BYTES // row_nbytes, capacity // 8) - CHUNK_ROWS


def test_segment_rows_are_taken_as_asked() -> None:
    assert choose_geometry(100, 10_000, 4096).total == 4096


def stored(shard_path: Path) -> list[Path]:
    return list(layout.segment_paths(shard_path).values())


def by_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


@pytest.mark.parametrize("table", [IMAGES, VECTORS], ids=["image", "vector"])
def test_foreign_readers_see_exactly_the_committed_rows_of_a_live_segment(
    tmp_path: Path, table: TableSpec
) -> None:
    shard = ReplayShard(tmp_path, 0, table, capacity_rows=4096)
    streams = [StreamId(actor=a, env=e) for a in (0, 4) for e in (0, 1, 2)]
    sent = dict.fromkeys(streams, 0)
    rng = np.random.default_rng(0)
    for _ in range(2):
        for stream in streams:
            count = int(rng.integers(20, 90))
            shard.append([synthetic.rows(table, stream, sent[stream], count)], 5.0)
            sent[stream] += count
        seen = dict.fromkeys(streams, 0)
        for path in stored(layout.shard_dir(tmp_path, 0)):
            group = zarr.open_group(path, mode="r")
            overlay = zarr.open_group(layout.overlay_path(path), mode="r")
            assert set(group.array_keys()) == set(table.columns) | {"committed", "_slots", "_check"}
            assert set(overlay.array_keys()) == set(table.overlay) | {"_check"}
            for slot, rows in enumerate(group["committed"][:]):
                if rows == 0:
                    continue
                actor, env, start = group["_slots"][slot]
                stream = StreamId(actor=int(actor), env=int(env))
                wanted = synthetic.rows(table, stream, int(start), int(rows))
                for name, values in wanted.columns.items():
                    array = (group if name in table.columns else overlay)[name]
                    assert array.dtype == values.dtype
                    np.testing.assert_array_equal(array[slot, :rows], values)
                seen[stream] += int(rows)
        assert seen == sent
    for path in stored(layout.shard_dir(tmp_path, 0)):
        ours = zarr.open_group(path, mode="r")
        for name in (*table.columns, "committed", "_slots", "_check"):
            np.testing.assert_array_equal(by_tensorstore(path / name), ours[name][...])
    shard.close()


def test_a_segment_says_what_it_is(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path, 0, VECTORS, capacity_rows=1024)
    shard.append([synthetic.rows(VECTORS, StreamId(actor=0, env=0), 0, 200)], 5.0)
    paths = stored(layout.shard_dir(tmp_path, 0))
    about = [zarr.open_group(path, mode="r").attrs["replay"] for path in paths]
    assert [a["number"] for a in about] == [0, 1]
    assert [a["previous"] for a in about] == [-1, 0]
    assert {a["schema"] for a in about} == {VECTORS.digest}
    array = zarr.open_group(paths[0], mode="r")["vector"]
    assert array.shape == (2, 64, 4)
    assert array.shards == array.shape
    assert array.chunks == (1, 64, 4)
    shard.close()


def test_half_made_segments_are_removed_at_opening(tmp_path: Path) -> None:
    ReplayShard(tmp_path, 0, VECTORS, capacity_rows=1024).close()
    directory = layout.shard_dir(tmp_path, 0)
    (directory / layout.SCRATCH / "00000003-e0001.zarr" / "vector").mkdir(parents=True)
    (directory / "00000009-e0001.overlay.zarr").mkdir()
    shard = ReplayShard(tmp_path, 0, VECTORS, capacity_rows=1024)
    assert not (directory / "00000009-e0001.overlay.zarr").exists()
    shard.close()
    assert list((directory / layout.SCRATCH).iterdir()) == []


def test_reopening_gives_back_the_blocks_its_dead_owner_reserved(tmp_path: Path) -> None:
    table = synthetic.image_table(size=32)
    stream = StreamId(actor=1, env=0)
    shard = ReplayShard(tmp_path, 0, table, capacity_rows=8192, segment_rows=1024)
    shard.append([synthetic.rows(table, stream, 0, 100)], 5.0)
    (path,) = stored(layout.shard_dir(tmp_path, 0))
    image = path / "image" / "c" / "0" / "0" / "0" / "0" / "0"
    before = image.stat()
    shard.close()
    shard = ReplayShard(tmp_path, 0, table, capacity_rows=8192, segment_rows=1024)
    after = image.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks < before.st_blocks / 4
    wanted = synthetic.rows(table, stream, 0, 100).columns["image"]
    group = zarr.open_group(path, mode="r")
    counts, slots = group["committed"][:], group["_slots"][:]
    for slot in np.flatnonzero(counts):
        begin = int(slots[slot, 2])
        rows = int(counts[slot])
        np.testing.assert_array_equal(group["image"][slot, :rows], wanted[begin : begin + rows])
    shard.close()
