"""Far segments: the same rows out of an object store, each chunk checked, the catalog never torn."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from replay import far, layout, seal, synthetic
from replay.batches import BatchBuffer
from replay.object_store import ObjectStore, StoreError, open_store
from replay.quarantine import SUSPECTS
from replay.raw import MappedSegment
from replay.read_ahead import ReadAhead
from replay.rows import RowsGone
from replay.segment import Segment
from system.errors import ConfigError, IntegrityError

TABLE = synthetic.image_table(16)
USED = (256, 100, 0)  # as the fixture makes them
NAME = "0000-00000007-e0001"
MakeSegment = Callable[..., Segment]
MakePath = Callable[..., Path]


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    urls = {"file": f"file://{tmp_path}/store", "memory": f"memory:///{tmp_path.name}"}
    return open_store(urls[request.param])


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    made = ReadAhead(parallel=2, cache_nbytes=1 << 20, wait_seconds=20.0)
    yield made
    made.close()


@pytest.fixture
def make_far(shard: Path, make_cold: MakePath) -> MakePath:
    """Uploads a segment and leaves only its far form."""

    def make(segment: Segment, store: ObjectStore) -> Path:
        shelf = far.FarShelf(store, 0, epoch=1)
        path = make_cold(shard, segment)
        manifest = shelf.upload(path, NAME)
        draft = shard / layout.SCRATCH / layout.tier_path(path, "far").name
        far.write_far(path, manifest, TABLE, draft)
        shelf.publish({NAME: sum(manifest.committed)})
        layout.kept_path(draft).rename(layout.kept_path(path))
        final = draft.rename(layout.tier_path(path, "far"))
        layout.remove(layout.discard(shard, path, overlay=False))
        layout.remove(layout.discard(shard, segment.path, overlay=False))
        return final

    return make


def test_a_far_segment_gives_the_rows_of_the_raw_one(
    shard: Path, store: ObjectStore, ahead: ReadAhead, sealed_segment: MakeSegment, make_far: MakePath
) -> None:
    raw = MappedSegment(segment := sealed_segment(shard))
    path = make_far(segment, store)
    assert seal.verify(path) == []
    home = far.FarSegment(path, TABLE, store=store, ahead=ahead)
    np.testing.assert_array_equal(home.committed, USED)
    np.testing.assert_array_equal(home.slots, segment.slots)
    wanted, found = (BatchBuffer(TABLE.all, 1, 260) for _ in range(2))
    for first, count in [(0, 256), (63, 2), (5, 130), (256, 100)]:
        home.will_need(first, count)
        home.copy_rows(found.sequences[0], 3, first, count)
        raw.copy_rows(wanted.sequences[0], 3, first, count)
        for name, values in wanted.columns.items():
            np.testing.assert_array_equal(found.columns[name], values, err_msg=f"{name} {first}")
    assert ahead.misses == 0
    assert home.write_overlay("latent", 5, np.ones((3, 8), np.uint16)) == 3
    np.testing.assert_array_equal(segment.overlay["latent"][0, 5:8], 1)


def test_narrow_columns_that_are_not_kept_are_fetched(
    shard: Path, store: ObjectStore, ahead: ReadAhead, sealed_segment: MakeSegment, make_far: MakePath
) -> None:
    raw = MappedSegment(segment := sealed_segment(shard))
    path = make_far(segment, store)
    layout.remove([layout.kept_path(path)])
    home = far.FarSegment(path, TABLE, store=store, ahead=ahead)
    wanted, found = (BatchBuffer(TABLE.all, 1, 65) for _ in range(2))
    home.copy_rows(found.sequences[0], 0, 100, 65)
    raw.copy_rows(wanted.sequences[0], 0, 100, 65)
    np.testing.assert_array_equal(found.columns["step"], wanted.columns["step"])


def test_other_zarr_implementations_read_the_uploaded_objects(
    shard: Path, tmp_path: Path, sealed_segment: MakeSegment, make_far: MakePath
) -> None:
    store = open_store(f"file://{tmp_path}/plain")
    segment = sealed_segment(shard)
    make_far(segment, store)
    path = tmp_path / "plain" / "shard-0000" / f"{NAME}.cold.zarr"
    group = zarr.open_group(path, mode="r")
    for name, array in segment.columns.items():
        by_zarr = np.asarray(group[name][:])
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
        by_tensorstore = tensorstore.open(spec, read=True, open=True).result().read().result()
        for slot, used in enumerate(USED):
            np.testing.assert_array_equal(by_zarr[slot, :used], array[slot, :used])
            np.testing.assert_array_equal(by_tensorstore[slot, :used], array[slot, :used])


def spoil_chunk(store: ObjectStore, key: str) -> None:
    data = bytearray(store.get(key))
    data[10] ^= 4
    store.put(key, bytes(data))


def cut_object(store: ObjectStore, key: str) -> None:
    store.put(key, bytes(store.get(key))[:20])


def drop_object(store: ObjectStore, key: str) -> None:
    store.delete([key])


@pytest.mark.parametrize("harm", [spoil_chunk, cut_object, drop_object])
def test_no_damaged_object_reaches_a_batch(
    shard: Path,
    store: ObjectStore,
    ahead: ReadAhead,
    harm: Callable[[ObjectStore, str], None],
    sealed_segment: MakeSegment,
    make_far: MakePath,
) -> None:
    path = make_far(sealed_segment(shard), store)
    home = far.FarSegment(path, TABLE, store=store, ahead=ahead)
    (key,) = [k for k in store.keys("shard-0000") if "/image/c/" in k]
    harm(store, key)
    buffer = BatchBuffer(TABLE.all, 1, 65)
    for ahead_of_time in (True, False):
        if ahead_of_time:
            home.will_need(0, 65)
        with pytest.raises(RowsGone):
            home.copy_rows(buffer.sequences[0], 0, 0, 65)
    assert (shard / SUSPECTS / path.name).exists() == (harm is spoil_chunk)


class NoisyOnce(ObjectStore):
    """A store whose first range arrives with a flipped bit."""

    def __init__(self, store: ObjectStore) -> None:
        self.url = store.url
        self._inner = store
        self.requests = 0

    def get_range(self, key: str, start: int, stop: int) -> memoryview:
        data = bytearray(self._inner.get_range(key, start, stop))
        self.requests += 1
        data[5] ^= 16 if self.requests == 1 else 0
        return memoryview(bytes(data))


def test_damage_on_the_way_costs_one_more_request(
    shard: Path, store: ObjectStore, ahead: ReadAhead, sealed_segment: MakeSegment, make_far: MakePath
) -> None:
    raw = MappedSegment(segment := sealed_segment(shard))
    noisy = NoisyOnce(store)
    home = far.FarSegment(make_far(segment, store), TABLE, store=noisy, ahead=ahead)
    home.will_need(0, 10)
    buffer, wanted = (BatchBuffer(TABLE.all, 1, 10) for _ in range(2))
    home.copy_rows(buffer.sequences[0], 0, 0, 10)
    raw.copy_rows(wanted.sequences[0], 0, 0, 10)
    np.testing.assert_array_equal(buffer.columns["image"], wanted.columns["image"])
    assert noisy.requests == 2


class Down(ObjectStore):
    """A store that answers no read."""

    def __init__(self, store: ObjectStore) -> None:
        self.url = store.url
        self.requests = 0

    def get_range(self, key: str, start: int, stop: int) -> memoryview:
        self.requests += 1
        raise StoreError("no route")


def test_a_store_that_is_down_is_not_waited_for_again_and_again(
    store: ObjectStore, ahead: ReadAhead, sealed_segment: MakeSegment, make_far: MakePath, shard: Path
) -> None:
    down = Down(store)
    home = far.FarSegment(make_far(sealed_segment(shard), store), TABLE, store=down, ahead=ahead)
    buffer = BatchBuffer(TABLE.all, 1, 65)
    for first in (0, 64, 128):
        with pytest.raises(RowsGone):
            home.copy_rows(buffer.sequences[0], 0, first, 65)
        home.will_need(first, 65)
    assert down.requests == 1
    assert ahead.nbytes == 0


def test_an_upload_of_a_damaged_segment_is_refused(
    shard: Path, store: ObjectStore, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    path = make_cold(shard, sealed_segment(shard))
    file = path / "reward" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="reward"):
        far.FarShelf(store, 0).upload(path, NAME)


def test_a_segment_counts_only_once_the_catalog_names_it(
    shard: Path, store: ObjectStore, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    shelf = far.FarShelf(store, 0, epoch=1)
    path = make_cold(shard, sealed_segment(shard))
    shelf.upload(path, NAME)
    assert shelf.catalog().segments == {}
    assert far.FarShelf(store, 0, epoch=2).sweep() == [NAME]
    assert store.keys("shard-0000") == {}
    shelf.upload(path, NAME)
    assert shelf.publish({NAME: 356}) == 1
    assert shelf.publish({NAME: 356}) == 1
    assert shelf.sweep() == []
    shelf.remove([NAME])
    assert shelf.catalog().generation == 2
    assert set(store.keys("shard-0000")) == {f"shard-0000/catalog-{n:08d}.json" for n in (1, 2)}


def test_an_older_life_cannot_write_the_catalog(store: ObjectStore) -> None:
    far.FarShelf(store, 0, epoch=2).publish({"a": 1})
    with pytest.raises(StoreError, match="another process"):
        far.FarShelf(store, 0, epoch=1).publish({"b": 1})
    assert far.FarShelf(store, 0, epoch=3).publish({"c": 2}) == 2
    assert far.FarShelf(store, 0).catalog().segments == {"a": 1, "c": 2}


def test_old_catalogs_are_deleted_and_a_damaged_one_is_named(store: ObjectStore) -> None:
    shelf = far.FarShelf(store, 0, epoch=1)
    for n in range(20):
        shelf.publish({str(n): n})
    assert len(store.keys("shard-0000")) == far.CATALOGS_KEPT
    store.put("shard-0000/catalog-00000021.json", json.dumps({"segments": []}).encode())
    with pytest.raises(IntegrityError, match="catalog-00000021"):
        shelf.catalog()


def test_memory_for_chunks_is_bounded(
    shard: Path, store: ObjectStore, sealed_segment: MakeSegment, make_far: MakePath
) -> None:
    home_path = make_far(sealed_segment(shard, noisy=True), store)
    ahead = ReadAhead(parallel=2, cache_nbytes=150_000, most_waiting=3)
    home = far.FarSegment(home_path, TABLE, store=store, ahead=ahead)
    for _ in range(3):
        for first in (0, 64, 128, 192, 256):
            home.will_need(first, 64)
            assert ahead.nbytes <= 150_000
    buffer = BatchBuffer(TABLE.all, 1, 64)
    home.copy_rows(buffer.sequences[0], 0, 0, 64)
    ahead.close()


def test_a_url_of_no_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="must begin with"):
        open_store("ftp://somewhere")
