"""Moving sealed segments: every row is served once, lifetime counts stay, and a cut-off move is finished."""

from pathlib import Path

import numpy as np
import pytest

from replay import layout, move, seal, synthetic
from replay.adoption import adopt_shard
from replay.layout import StoredSegment
from replay.segment import data_path
from replay.shard import ReplayShard
from replay.tiers import stages_of
from replay.view import TableView
from system.errors import ConfigError, IntegrityError, PreflightError, SchemaError
from system.experience import StreamId

TABLE = synthetic.image_table(16)
ENVS = 2


def open_shard(root: Path, index: int, capacity_rows: int = 2048, **changes: object) -> ReplayShard:
    return ReplayShard(root, index, TABLE, capacity_rows=capacity_rows, segment_rows=128, **changes)


def fill(shard: ReplayShard, first: int, last: int) -> None:
    for start in range(first, last, 30):
        for env in range(ENVS):
            chunk = synthetic.rows(TABLE, StreamId(actor=shard.index, env=env), start, min(30, last - start))
            shard.append([chunk], 5.0)
    assert shard.settle(20.0)


def live(root: Path) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Live ranges of every stream, each row compared with what was sent."""
    view = TableView(root, TABLE, 1)
    assert view.settle(20.0)
    bounds = {}
    for key, runs in view.index.streams.items():
        bounds[key] = list(runs.bounds)
        for lo, hi in runs.bounds:
            at = lo
            for piece in runs.pieces(lo, hi - lo):
                stream = StreamId(actor=key[1] >> 16, env=key[1] & 0xFFFF)
                wanted = synthetic.rows(TABLE, stream, at, piece.rows).columns
                views = piece.home.segment.columns
                for name in ("image", "vector", "step"):
                    flat = views[name].reshape(-1, *views[name].shape[2:])
                    np.testing.assert_array_equal(flat[piece.first : piece.first + piece.rows], wanted[name])
                at += piece.rows
    view.release()
    return bounds


def counts(root: Path, shards: int = 2) -> tuple[list[int], int]:
    view = TableView(root, TABLE, 1)
    assert view.settle(20.0)
    found = view.inserted(shards), view.index.rows
    view.release()
    return found


def test_a_move_changes_no_row_and_no_count(tmp_path: Path) -> None:
    source, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(source, 0, 400)
    fill(target, 0, 100)
    before, rows_before, held = live(tmp_path), counts(tmp_path), source.stats()
    oldest = source.sealed()[0]
    assert move.move(source, target, oldest) == 128
    assert live(tmp_path) == before
    assert counts(tmp_path) == rows_before
    assert source.stats().inserted == held.inserted
    assert source.stats().rows == held.rows - 128
    assert target.stats().rows == 200 + 128
    assert target.stats().inserted == 200
    place = layout.shard_dir(tmp_path, 1) / "from-0000"
    assert [s.stem for s in layout.stored_segments(place)] == [oldest.stem]
    source.close()
    target.close()
    assert live(tmp_path) == before
    source, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    assert live(tmp_path) == before
    assert counts(tmp_path) == rows_before
    fill(source, 400, 430)
    assert counts(tmp_path)[0] == [860, 200]
    source.close()
    target.close()


def test_a_reader_keeps_reading_while_segments_move(tmp_path: Path) -> None:
    source, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(source, 0, 400)
    view = TableView(tmp_path, TABLE, 20)
    assert view.settle(20.0)
    total = view.index.total
    for segment in source.sealed():
        target.adopt(segment.path)
        view.refresh()
        assert view.index.total == total  # two copies count once
        source.let_go(segment.origin, segment.stem)
        view.refresh()
        view.refresh()
        assert view.index.total == total
    source.close()
    target.close()


def test_a_move_that_was_cut_off_is_finished_at_opening(tmp_path: Path) -> None:
    source, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(source, 0, 400)
    before = live(tmp_path)
    first, second = source.sealed()[:2]
    target.adopt(first.path)
    target.adopt(second.path)
    assert live(tmp_path) == before
    source.close()
    source = open_shard(tmp_path, 0)
    stems = [s.stem for s in source.sealed()]
    assert first.stem not in stems
    assert second.stem not in stems
    assert source.stats().inserted == 800
    assert live(tmp_path) == before
    assert move.move_all(source, target, 10_000) > 0
    target.close()
    target = open_shard(tmp_path, 1)  # the taker keeps what it took
    assert live(tmp_path) == before
    source.close()
    target.close()


def test_of_two_takers_one_keeps_the_segment(tmp_path: Path) -> None:
    shards = [open_shard(tmp_path, n) for n in range(3)]
    fill(shards[0], 0, 200)
    before = live(tmp_path)
    segment = shards[0].sealed()[0]
    move.move(shards[0], shards[1], segment)
    moved = shards[1].sealed()[0]
    assert moved.origin == 0
    shards[2].adopt(moved.path)
    for shard in shards:
        shard.close()
    shards = [open_shard(tmp_path, n) for n in range(3)]
    assert move.holders(tmp_path, 0, segment.stem) == [2]
    assert live(tmp_path) == before
    for shard in shards:
        shard.close()


def test_what_may_not_move_is_refused(tmp_path: Path) -> None:
    source, target = open_shard(tmp_path / "a", 0), open_shard(tmp_path / "a", 1)
    stranger = open_shard(tmp_path / "b", 1)
    fill(source, 0, 400)
    oldest, newer = source.sealed()[:2]
    with pytest.raises(IntegrityError, match="held by another shard"):
        source.let_go(0, oldest.stem)
    with pytest.raises(ConfigError, match="oldest"):
        source.let_go(0, newer.stem)
    with pytest.raises(SchemaError, match="another table"):
        stranger.adopt(oldest.path)
    with pytest.raises(ConfigError, match="itself"):
        source.adopt(oldest.path)
    data = data_path(oldest.path, "reward", 2)
    data.write_bytes(data.read_bytes()[:-9] + b"123456789")
    with pytest.raises(IntegrityError, match="damaged"):
        target.adopt(oldest.path)
    assert target.sealed() == []
    with pytest.raises(FileNotFoundError):
        target.adopt(layout.shard_dir(tmp_path / "a", 0) / "00000099-e0001.zarr")
    for shard in (source, target, stranger):
        shard.close()


def test_compressed_segments_move_too(tmp_path: Path) -> None:
    directory = layout.shard_dir(tmp_path, 0)
    stages = stages_of(directory, 0, TABLE, compress=True, cold_after=0, far=None, far_after=0)
    source, target = open_shard(tmp_path, 0, stages=stages), open_shard(tmp_path, 1)
    for start in range(0, 300, 30):
        chunk = synthetic.rows(TABLE, StreamId(actor=0, env=0), start, 30)
        still = np.zeros_like(chunk.columns["image"])
        source.append([type(chunk)(stream=chunk.stream, columns={**chunk.columns, "image": still})], 5.0)
    assert source.settle(20.0)
    assert source.sealed()[0].tier == "cold"
    rows = counts(tmp_path)
    assert move.move_all(source, target, 10_000) == 256
    assert counts(tmp_path) == rows
    assert {s.tier for s in target.sealed()} == {"cold"}
    source.close()
    target.close()
    assert counts(tmp_path) == rows


def test_latents_written_during_a_move_are_kept(tmp_path: Path) -> None:
    source, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(source, 0, 200)
    view = TableView(tmp_path, TABLE, 1)
    assert view.settle(20.0)
    segment = source.sealed()[0]
    target.adopt(segment.path)
    piece = next(iter(view.index.streams[0, 0].pieces(3, 4)))
    assert piece.home.write_overlay("latent", piece.first, np.full((4, 8), 7, np.uint16)) == 4
    source.let_go(segment.origin, segment.stem)
    moved = TableView(tmp_path, TABLE, 1)
    assert moved.settle(20.0)
    piece = next(iter(moved.index.streams[0, 0].pieces(3, 4)))
    assert "from-0000" in str(piece.home.segment.path)
    flat = piece.home.segment.overlay["latent"].reshape(-1, 8)
    np.testing.assert_array_equal(flat[piece.first : piece.first + 4], 7)
    source.close()
    target.close()


def test_a_dead_shard_is_taken_over(tmp_path: Path) -> None:
    dead, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(dead, 0, 400)
    fill(target, 0, 60)
    before, rows = live(tmp_path), counts(tmp_path)
    with pytest.raises(PreflightError, match="is owned by"):
        adopt_shard(tmp_path, 0, TABLE, target, room_rows=300, timeout=20.0)
    dead.close()
    assert adopt_shard(tmp_path, 0, TABLE, target, room_rows=300, timeout=20.0) == 256
    assert live(tmp_path) == before
    assert adopt_shard(tmp_path, 0, TABLE, target, room_rows=10_000, timeout=20.0) == 800 - 256
    assert live(tmp_path) == before
    assert counts(tmp_path) == rows
    assert layout.stored_segments(layout.shard_dir(tmp_path, 0)) == []
    dead = open_shard(tmp_path, 0)  # and when it comes back it goes on where it was
    fill(dead, 400, 430)
    assert dead.stats().inserted == 860
    assert live(tmp_path)[0, 0] == [(0, 430)]
    dead.close()
    target.close()


def test_a_dead_shard_keeps_the_rows_that_came_from_its_taker(tmp_path: Path) -> None:
    dead, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(target, 0, 400)
    fill(dead, 0, 400)
    given = target.sealed()[0]
    move.move(target, dead, given)
    before, rows = live(tmp_path), counts(tmp_path)
    dead.close()
    assert adopt_shard(tmp_path, 0, TABLE, target, room_rows=10_000, timeout=20.0) == 800
    assert (live(tmp_path), counts(tmp_path)) == (before, rows)
    assert move.holders(tmp_path, 1, given.stem) == [0]
    target.close()


def stored(number: int, origin: int, tier: layout.Tier = "raw") -> StoredSegment:
    name = layout.segment_name(number, 1)
    return StoredSegment(path=Path(name), number=number, epoch=1, tier=tier, origin=origin)


def test_rebalancing_evens_out_bytes_within_the_room_there_is() -> None:
    held = {0: [(stored(n, 0), 100) for n in range(10)], 1: [(stored(0, 1), 100)], 2: []}
    moves = move.plan_moves(held, {1: 10_000, 2: 10_000})
    load = {shard: sum(nbytes for _, nbytes in pairs) for shard, pairs in held.items()}
    for one in moves:
        load[one.source] -= one.nbytes
        load[one.target] += one.nbytes
    assert max(load.values()) - min(load.values()) <= 100
    assert [one.segment.number for one in moves] == list(range(len(moves)))
    assert [one.target for one in move.plan_moves(held, {2: 250})] == [2, 2]
    assert move.plan_moves(held, {}) == []
    assert move.plan_moves({0: held[0], 1: held[0]}, {0: 10**6, 1: 10**6}) == []
    far = {0: [(stored(n, 0, "far"), 100) for n in range(10)], 1: []}
    assert move.plan_moves(far, {1: 10**6}) == []
    home = {0: [(stored(n, 1), 100) for n in range(10)], 1: []}
    assert move.plan_moves(home, {1: 10**6}) == []


def test_a_manifest_keeps_where_its_rows_come_from(tmp_path: Path) -> None:
    source, target = open_shard(tmp_path, 0), open_shard(tmp_path, 1)
    fill(source, 0, 200)
    move.move(source, target, source.sealed()[0])
    (taken,) = target.sealed()
    assert seal.read_manifest(taken.path).origin == 0
    source.close()
    target.close()
