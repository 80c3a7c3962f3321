"""What a reader makes of shards that grow, move, vanish and rot under it."""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from replay import layout, seal, synthetic
from replay.catalog import Catalog
from replay.cold import plan_codecs, write_cold
from replay.index import StartIndex
from replay.rows import Home, RowViews
from replay.segment import Segment, data_path
from replay.shard import ReplayShard
from replay.view import TableView
from system.experience import StreamId
from system.metrics import Metrics

TABLE = synthetic.vector_table()


def append(shard: ReplayShard, start: int, count: int, *, actor: int = 0, env: int = 0) -> None:
    chunk = synthetic.rows(TABLE, StreamId(actor=actor, env=env), start, count)
    assert shard.append([chunk], 5.0).committed == count


def filled(root: Path, rows: int = 300, index: int = 0) -> Path:
    """A shard of one stream in segments of two slots of 64 rows, closed again."""
    shard = ReplayShard(root, index, TABLE, capacity_rows=1024)
    for start in range(0, rows, 20):
        append(shard, start, min(20, rows - start))
    shard.close()
    return layout.shard_dir(root, index)


def bounds(view: TableView, shard: int = 0, stream: int = 0) -> list[tuple[int, int]]:
    return view.index.stream(shard, stream).bounds


def check_rows(index: StartIndex[Home], shard: int = 0, stream: int = 0, *, overlay: bool = True) -> int:
    """Copy every live row of a stream and compare it with what was sent; return how many."""
    runs, seen = index.stream(shard, stream), 0
    for lo, hi in runs.bounds:
        got = {name: np.zeros((hi - lo, *spec.shape), spec.dtype) for name, spec in TABLE.all.items()}
        at = 0
        for piece in runs.pieces(lo, hi - lo):
            piece.home.copy_rows(RowViews(got), at, piece.first, piece.rows)
            at += piece.rows
        sent = synthetic.rows(TABLE, StreamId(actor=stream >> 16, env=stream & 0xFFFF), lo, hi - lo)
        for name, values in sent.columns.items():
            if overlay or name in TABLE.columns:
                np.testing.assert_array_equal(got[name], values)
            else:  # damaged overlay rows are reset
                assert ((got[name] == values) | (got[name] == 0)).all()
        seen += hi - lo
    return seen


def segment(directory: Path, number: int) -> Path:
    return layout.segment_paths(directory)[number]


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.write_bytes(raw)


def test_a_flipped_row_costs_its_append_and_what_follows_in_its_slot(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    path = segment(directory, 1)  # positions 128 .. 255 in slots of 64
    row = TABLE.columns["vector"].nbytes
    flip(data_path(path, "vector", 3), 25 * row)  # position 153, in the append of rows 140 .. 159
    metrics = Metrics("run", "learner", 0)
    view = TableView(tmp_path, TABLE, 1, metrics=metrics)
    (before, after) = bounds(view)
    assert before[0] == 0
    assert 140 <= before[1] <= 153
    assert after == (192, 300)
    assert check_rows(view.index) == view.index.rows == 300 - (192 - before[1])
    assert metrics.value("replay_rows_skipped_total") == 192 - before[1]
    view.release()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "zarr.json").write_text('{"attributes": {'),
        lambda path: (path / "zarr.json").write_text("{}"),
        lambda path: data_path(path, "reward", 2).unlink(),
        lambda path: data_path(path, "step", 2).write_bytes(b"short"),
        lambda path: flip(data_path(path, "committed", 1), 5),
        lambda path: data_path(path, "_slots", 2).write_bytes(b"\xff" * 48),
        lambda path: shutil.rmtree(layout.overlay_path(path)),
    ],
)
def test_a_damaged_segment_is_left_out_and_counted_once(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    directory = filled(tmp_path)
    damage(segment(directory, 1))
    metrics = Metrics("run", "learner", 0)
    view = TableView(tmp_path, TABLE, 5, metrics=metrics)
    assert bounds(view) == [(0, 128), (256, 300)]
    shutil.move(segment(directory, 1), tmp_path / "taken away")
    for _ in range(3):
        view.refresh()
    assert check_rows(view.index) == 172
    assert metrics.value("replay_segments_skipped_total", reason="damaged") == 1
    view.release()


@pytest.mark.parametrize("owned", [False, True])
def test_damaged_latents_are_reset_before_they_are_drawn(tmp_path: Path, owned: bool) -> None:
    directory = filled(tmp_path)
    row = TABLE.overlay["latent"].nbytes
    flip(data_path(layout.overlay_path(segment(directory, 1)), "latent", 3), 5 * row)  # position 133
    owner = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024) if owned else None
    view = TableView(tmp_path, TABLE, 5)
    (piece,) = view.index.stream(0, 0).pieces(132, 3)
    got = {name: np.ones((3, *spec.shape), spec.dtype) for name, spec in TABLE.all.items()}
    piece.home.copy_rows(RowViews(got), 0, piece.first, 3)
    sent = synthetic.rows(TABLE, StreamId(actor=0, env=0), 132, 3).columns["latent"]
    assert not got["latent"][1].any()
    np.testing.assert_array_equal(got["latent"][[0, 2]], sent[[0, 2]])
    view.release()
    if owner is not None:
        owner.close()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_byte_is_flipped_no_wrong_row_is_drawn(tmp_path: Path, seed: int) -> None:
    filled(tmp_path / "sound")
    make_cold(layout.shard_dir(tmp_path / "sound", 0), 0)
    shutil.rmtree(segment(layout.shard_dir(tmp_path / "sound", 0), 0))
    rng = random.Random(seed)
    for trial in range(8):
        root = tmp_path / str(trial)
        shutil.copytree(tmp_path / "sound", root)
        files = sorted(p for p in layout.shard_dir(root, 0).rglob("*") if p.is_file() and p.stat().st_size)
        file = rng.choice([p for p in files if ".zarr" in str(p)])
        raw = bytearray(file.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
        view = TableView(root, TABLE, 5)
        assert {key for key, runs in view.index.streams.items() if runs.bounds} <= {(0, 0)}, file
        assert check_rows(view.index, overlay=False) >= 300 - 128, file
        view.release()
        shutil.rmtree(root)


def test_a_segment_of_another_table_is_left_out(tmp_path: Path) -> None:
    directory = filled(tmp_path / "a")
    other = ReplayShard(tmp_path / "b", 0, synthetic.vector_table(vector=9), capacity_rows=1024)
    other.append([synthetic.rows(other.table, StreamId(actor=0, env=0), 0, 9)], 5.0)
    other.close()
    shutil.move(segment(layout.shard_dir(tmp_path / "b", 0), 0), directory / "00000007-e0001.zarr")
    view = TableView(tmp_path / "a", TABLE, 5)
    assert bounds(view) == [(0, 300)]
    view.release()


def test_a_segment_of_another_replay_with_the_same_schema_is_left_out(tmp_path: Path) -> None:
    directory, other = filled(tmp_path / "a"), filled(tmp_path / "b")
    ours = segment(directory, 0)
    shutil.rmtree(ours)
    shutil.move(segment(other, 0), ours)
    metrics = Metrics("run", "learner", 0)
    view = TableView(tmp_path / "a", TABLE, 5, metrics=metrics)
    assert bounds(view) == [(128, 300)]
    assert metrics.value("replay_segments_skipped_total", reason="schema") == 1
    view.release()


def test_latents_of_another_replay_or_segment_read_as_zeros(tmp_path: Path) -> None:
    directory, other = filled(tmp_path / "a"), filled(tmp_path / "b")
    for number, source in ((0, segment(other, 0)), (1, segment(directory, 0))):
        target = layout.overlay_path(segment(directory, number))
        shutil.copytree(layout.overlay_path(source), tmp_path / "copy")
        shutil.rmtree(target)
        (tmp_path / "copy").rename(target)
    view = TableView(tmp_path / "a", TABLE, 5)
    assert check_rows(view.index, overlay=False) == 300
    for piece in view.index.stream(0, 0).pieces(0, 256):
        target = RowViews({n: np.ones((128, *s.shape), s.dtype) for n, s in TABLE.all.items()})
        piece.home.copy_rows(target, 0, piece.first, piece.rows)
        assert not target.columns["latent"][: piece.rows].any()
    view.release()


def test_reading_goes_on_without_the_owner_and_with_the_next_one(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    append(shard, 0, 90)
    view = TableView(tmp_path, TABLE, 5)
    (followed,) = view.views
    assert followed.alive
    shard.close()
    view.refresh()
    assert check_rows(view.index) == 90
    fresh = TableView(tmp_path, TABLE, 5)
    assert not fresh.views[0].alive
    assert check_rows(fresh.index) == 90
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    append(shard, 90, 300)
    for reader in (view, fresh):
        reader.refresh()
        assert check_rows(reader.index) == 390
        reader.release()
    shard.close()


def test_shards_come_and_go_and_are_replaced_under_a_reader(tmp_path: Path) -> None:
    view = TableView(tmp_path, TABLE, 5)
    filled(tmp_path, 100, index=0)
    filled(tmp_path, 200, index=3)
    view.refresh()
    assert (view.inserted(4), view.index.rows) == ([100, 0, 0, 200], 300)
    shutil.rmtree(layout.shard_dir(tmp_path, 0))
    view.refresh()
    assert (view.inserted(4), view.index.rows) == ([0, 0, 0, 200], 200)
    shutil.rmtree(layout.shard_dir(tmp_path, 3))
    filled(tmp_path, 40, index=3)
    view.refresh()
    assert (view.index.rows, check_rows(view.index, shard=3)) == (40, 40)
    view.release()
    assert view.index.rows == 0


def make_cold(directory: Path, number: int) -> Path:
    """Publish the cold tier of a segment beside the raw one, as the mover does."""
    raw = Segment.open(segment(directory, number), TABLE)
    manifest = seal.Manifest(
        name=raw.path.name.removesuffix(".zarr"),
        tier="raw",
        schema=TABLE.digest,
        replay="test",
        origin=0,
        number=number,
        epoch=1,
        rows=raw.geometry.rows,
        committed=tuple(raw.committed.tolist()),
        slots=tuple((actor, env, start) for actor, env, start in raw.slots.tolist()),
        last=((0, 0, 0, 0),) * raw.geometry.slots,
        files={},
    )
    seal.seal(raw.path, manifest)
    final = layout.tier_path(raw.path, "cold")
    return write_cold(raw, TABLE, plan_codecs(raw), directory / layout.SCRATCH / final.name).rename(final)


def homes(view: TableView, position: int) -> set[str]:
    return {type(piece.home).__name__ for piece in view.index.stream(0, 0).pieces(position, 1)}


def test_a_segment_may_change_its_tier_under_a_reader(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    view = TableView(tmp_path, TABLE, 5)
    make_cold(directory, 1)
    bump(directory)
    view.refresh()
    assert homes(view, 130) == {"MappedSegment"}  # of two tiers the most local one
    shutil.rmtree(segment(directory, 1))
    pieces = list(view.index.stream(0, 0).pieces(120, 20))
    bump(directory)
    view.refresh()
    assert homes(view, 130) == {"ColdSegment"}
    assert bounds(view) == [(0, 300)]
    assert check_rows(view.index) == 300
    target = {name: np.zeros((12, *spec.shape), spec.dtype) for name, spec in TABLE.all.items()}
    pieces[1].home.copy_rows(RowViews(target), 0, pieces[1].first, 12)  # planned before the change
    wanted = synthetic.rows(TABLE, StreamId(actor=0, env=0), 128, 12).columns
    np.testing.assert_array_equal(target["vector"], wanted["vector"])
    fresh = TableView(tmp_path, TABLE, 5)
    assert check_rows(fresh.index) == 300
    for reader in (view, fresh):
        reader.release()


def test_a_damaged_cold_segment_is_left_out(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    cold = make_cold(directory, 1)
    shutil.rmtree(segment(directory, 1))
    flip(data_path(cold, "reward", 2), 40)
    view = TableView(tmp_path, TABLE, 5)
    assert bounds(view) == [(0, 128), (256, 300)]
    view.release()


def bump(directory: Path) -> None:
    """What the owner does after each change of the set of segments."""
    Catalog(directory, writable=True)["generation"] += 1


def test_rows_that_a_new_owner_cuts_off_are_not_drawn_any_more(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    view = TableView(tmp_path, TABLE, 5)
    owned = Segment.open(segment(directory, 0), TABLE, writable=True)
    owned.committed[0] = 40
    bump(directory)
    view.refresh()
    assert bounds(view) == [(0, 40), (64, 300)]
    view.release()


def test_adopted_segments_keep_the_identity_of_their_origin(tmp_path: Path) -> None:
    lost = filled(tmp_path, 300, index=1)
    heir = filled(tmp_path, 50, index=2)
    (heir / "from-0001").mkdir()
    for entry in list(lost.glob("0*.zarr")):
        shutil.move(entry, heir / "from-0001" / entry.name)
    shutil.rmtree(lost)
    view = TableView(tmp_path, TABLE, 5)
    assert (check_rows(view.index, shard=1), check_rows(view.index, shard=2)) == (300, 50)
    assert view.shards == 1
    view.release()


def test_a_catalog_that_was_lost_and_made_anew_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.view.FRESH_NANOSECONDS", 0)
    monkeypatch.setattr("replay.view.RELIST_SECONDS", 0.0)
    filled(tmp_path, 60)
    view = TableView(tmp_path, TABLE, 5)
    (layout.shard_dir(tmp_path, 0) / "catalog.bin").unlink()
    owner = ReplayShard(tmp_path, 0, TABLE, capacity_rows=1024)
    append(owner, 60, 40)
    view.refresh()
    assert check_rows(view.index) == 100
    assert view.inserted(1) == [100]
    owner.close()
    view.release()


def test_a_shard_is_followed_once_its_owner_has_counted_its_rows(tmp_path: Path) -> None:
    directory = filled(tmp_path, 60)
    (directory / "catalog.bin").unlink()
    catalog, lock = Catalog(directory, writable=True), layout.take_lock(directory)
    view = TableView(tmp_path, TABLE, 5)
    assert view.shards == 0
    catalog["inserted"], catalog["generation"] = 60, 1
    view.refresh()
    assert (view.inserted(1), check_rows(view.index)) == ([60], 60)
    lock.close()
    view.release()


def test_rows_are_the_same_after_they_were_read_ahead(tmp_path: Path) -> None:
    filled(tmp_path)
    view = TableView(tmp_path, TABLE, 5)
    for piece in view.index.stream(0, 0).pieces(0, 300):
        piece.home.will_need(piece.first, piece.rows)
    assert check_rows(view.index) == 300
    assert view.distant in (False, True)  # it depends on the page cache
    view.release()


def test_a_reader_beside_a_busy_shard_never_sees_a_wrong_row(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=512)
    append(shard, 0, 30)
    view = TableView(tmp_path, TABLE, 9)
    done = threading.Event()

    def write() -> None:
        sent, rng = {0: 30, 1: 0, 2: 0}, random.Random(0)
        for _ in range(50):
            env, count = rng.randrange(3), rng.randrange(1, 90)
            append(shard, sent[env], count, env=env)
            sent[env] += count
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    checked = 0
    while not done.is_set() or not checked:
        view.refresh()
        checked += sum(check_rows(view.index, stream=env) for env in range(3))
    writer.join()
    view.refresh()
    assert (
        view.index.rows == shard.stats().rows == sum(check_rows(view.index, stream=env) for env in range(3))
    )
    assert checked > 512
    view.release()
    shard.close()
