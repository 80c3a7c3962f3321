"""Cold segments: the same rows in less space, readable by anyone, and no damaged byte in a batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from replay import chunk_codec, cold, layout, seal, synthetic
from replay.batches import BatchBuffer
from replay.quarantine import SUSPECTS
from replay.raw import MappedSegment
from replay.rows import RowsGone
from replay.segment import CHUNK_ROWS, Segment, data_path
from system.errors import IntegrityError, SchemaError

TABLE = synthetic.image_table(16)
USED = (256, 100, 0)  # as the fixture makes them
MakeSegment = Callable[..., Segment]
MakePath = Callable[..., Path]


@pytest.mark.parametrize("noisy", [False, True], ids=["packed", "checked"])
def test_a_cold_segment_gives_the_rows_of_the_raw_one(
    shard: Path, noisy: bool, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    segment = sealed_segment(shard, noisy=noisy)
    raw, home = MappedSegment(segment), cold.ColdSegment(make_cold(shard, segment), TABLE)
    assert cold.plan_codecs(segment)["image"] == ("checked" if noisy else "packed")
    np.testing.assert_array_equal(home.committed, segment.committed)
    np.testing.assert_array_equal(home.slots, segment.slots)
    for first, count in [(0, 256), (0, 64), (63, 2), (5, 130), (64, 65), (256, 100), (256 + 99, 1)]:
        wanted, found = (BatchBuffer(TABLE.all, 1, 260) for _ in range(2))
        raw.copy_rows(wanted.sequences[0], 3, first, count)
        home.will_need(first, count)
        home.copy_rows(found.sequences[0], 3, first, count)
        for name, values in wanted.columns.items():
            np.testing.assert_array_equal(found.columns[name], values, err_msg=f"{name} {first}")


def test_only_what_shrinks_is_packed(shard: Path, sealed_segment: MakeSegment, make_cold: MakePath) -> None:
    segment = sealed_segment(shard)
    plan = cold.plan_codecs(segment)
    assert {name for name, codec in plan.items() if codec != "plain"} == {"image"}
    assert cold.pays(plan)
    path = make_cold(shard, segment)
    stored = data_path(path, "image", 5).stat().st_size
    assert stored * chunk_codec.WIN < data_path(segment.path, "image", 5).stat().st_size
    assert not cold.pays(cold.plan_codecs(sealed_segment(shard, number=8, noisy=True)))


@pytest.mark.parametrize("noisy", [False, True], ids=["packed", "checked"])
def test_other_zarr_implementations_read_a_cold_segment(
    shard: Path, noisy: bool, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    segment = sealed_segment(shard, noisy=noisy)
    path = make_cold(shard, segment)
    group = zarr.open_group(path, mode="r")
    assert group.attrs["replay"]["number"] == 7
    for name, array in segment.columns.items():
        by_zarr = np.asarray(group[name][:])
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
        by_tensorstore = tensorstore.open(store, read=True, open=True).result().read().result()
        for slot, used in enumerate(USED):
            np.testing.assert_array_equal(by_zarr[slot, :used], array[slot, :used])
            np.testing.assert_array_equal(by_tensorstore[slot, :used], array[slot, :used])
    np.testing.assert_array_equal(np.asarray(group["committed"][:]), USED)
    np.testing.assert_array_equal(np.asarray(group["_slots"][:]), segment.slots)


def test_no_flipped_byte_of_a_chunk_reaches_a_batch(
    shard: Path, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    segment = sealed_segment(shard)
    path = make_cold(shard, segment)
    file = data_path(path, "image", 5)
    whole = file.read_bytes()
    index = 3 * 256 // CHUNK_ROWS * 16 + 4
    buffer = BatchBuffer(TABLE.all, 1, 65)
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(whole) - index, 60).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        home, gone = cold.ColdSegment(path, TABLE), 0
        for first in (0, 64, 128, 191, 256, 291):
            buffer.columns["image"][:] = 0
            try:
                home.copy_rows(buffer.sequences[0], 0, first, 65)
            except RowsGone:
                gone += 1
                continue
            wanted = segment.columns["image"].reshape(-1, 16, 16, 3)[first : first + 65]
            np.testing.assert_array_equal(buffer.columns["image"][0], wanted)
        assert gone > 0
        assert "crc32c" in (shard / SUSPECTS / path.name).read_text()
        assert [damage.reason for damage in seal.verify(path)] == ["checksum"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x00"),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
    ],
    ids=["cut", "index", "empty", "deleted"],
)
def test_a_damaged_file_refuses_to_open(
    shard: Path, spoil, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    path = make_cold(shard, sealed_segment(shard))
    spoil(data_path(path, "image", 5))
    with pytest.raises(IntegrityError):
        cold.ColdSegment(path, TABLE)


def test_a_segment_of_another_table_is_refused(
    shard: Path, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    path = make_cold(shard, sealed_segment(shard))
    with pytest.raises(SchemaError, match="another replay"):
        cold.ColdSegment(path, synthetic.vector_table())
    with pytest.raises(FileNotFoundError):
        cold.ColdSegment(layout.tier_path(shard / "00000099-e0001.zarr", "cold"), TABLE)


def test_latents_written_to_a_cold_segment_are_read_back_and_checked(
    shard: Path, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    segment = sealed_segment(shard)
    home = cold.ColdSegment(make_cold(shard, segment), TABLE)
    values = np.arange(80, dtype=np.uint16).reshape(10, 8)
    assert home.write_overlay("latent", 60, values) == 10
    buffer = BatchBuffer(TABLE.all, 1, 20)
    home.copy_rows(buffer.sequences[0], 0, 55, 20)
    np.testing.assert_array_equal(buffer.columns["latent"][0, 5:15], values)
    np.testing.assert_array_equal(segment.overlay["latent"][0, 60:70], values)
    assert segment.mend_overlay() == 0


def test_a_torn_latent_is_reset_when_nobody_else_looks_after_it(
    shard: Path, sealed_segment: MakeSegment, make_cold: MakePath
) -> None:
    segment = sealed_segment(shard)
    home = cold.ColdSegment(make_cold(shard, segment), TABLE)
    home.write_overlay("latent", 60, np.ones((3, 8), np.uint16))
    segment.overlay["latent"][0, 61, 2] = 5
    np.testing.assert_array_equal(home.good_rows(), USED)
    assert segment.overlay["latent"][0, 61, 2] == 5
    home.mend()
    np.testing.assert_array_equal(segment.overlay["latent"][0, 60:63, 2], [1, 0, 1])
    assert segment.mend_overlay() == 0


def test_what_was_written_is_compared_before_it_counts(
    shard: Path, monkeypatch: pytest.MonkeyPatch, sealed_segment: MakeSegment
) -> None:
    segment = sealed_segment(shard)
    draft = shard / layout.SCRATCH / layout.tier_path(segment.path, "cold").name
    live = cold.live_rows

    def forgetful(of: Segment) -> np.ndarray:
        monkeypatch.setattr(cold, "live_rows", live)
        return live(of) & (np.arange(len(live(of))) != 70)

    plan = cold.plan_codecs(segment)
    monkeypatch.setattr(cold, "live_rows", forgetful)
    with pytest.raises(IntegrityError, match="reads back differently"):
        cold.write_cold(segment, TABLE, plan, draft)
    assert not draft.exists()
