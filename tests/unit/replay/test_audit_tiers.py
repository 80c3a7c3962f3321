"""The audit reads rows in every tier and at every shard, and knows what left from what is missing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from replay import layout, move, synthetic
from replay.audit import ReplayBooks, audit_replay
from replay.quarantine import report_damage
from replay.segment import data_path
from replay.shard import ReplayShard
from replay.tiers import stages_of
from system.experience import Chunk, StreamId

TABLE = synthetic.image_table(16)
ENVS = 2
OpenShard = Callable[..., ReplayShard]


@pytest.fixture
def open_shard(tmp_path: Path) -> Iterator[OpenShard]:
    """Opens a shard of the replay at `tmp_path`; tiers=True compresses segments and sends old ones away."""
    opened: list[ReplayShard] = []

    def make(index: int, *, tiers: bool = False, capacity: int = 4096) -> ReplayShard:
        directory = layout.shard_dir(tmp_path / "replay", index)
        far = (tmp_path / "bucket").as_uri() if tiers else None
        stages = stages_of(directory, index, TABLE, compress=tiers, cold_after=1, far=far, far_after=3)
        root = tmp_path / "replay"
        shard = ReplayShard(
            root, index, TABLE, capacity_rows=capacity, segment_rows=128, stages=stages if tiers else ()
        )
        opened.append(shard)
        return shard

    yield make
    for shard in opened:
        shard.close()


def still(chunk: Chunk) -> Chunk:
    """Rows whose pictures shrink."""
    return replace(chunk, columns={**chunk.columns, "image": np.zeros_like(chunk.columns["image"])})


def fill(shard: ReplayShard, last: int, *, first: int = 0) -> None:
    for start in range(first, last, 30):
        for env in range(ENVS):
            chunk = synthetic.rows(TABLE, StreamId(actor=shard.index, env=env), start, min(30, last - start))
            shard.append([still(chunk)], 5.0)
    assert shard.settle(30.0)


def audit(root: Path) -> ReplayBooks:
    return audit_replay(root / "replay")


def tiers(directory: Path) -> list[str]:
    return [stored.tier for stored in layout.stored_segments(directory)]


def test_rows_balance_in_whatever_tier_they_are(tmp_path: Path, open_shard: OpenShard) -> None:
    shard = open_shard(0, tiers=True)
    fill(shard, 500)
    assert set(tiers(shard.directory)) == {"raw", "cold", "far"}
    for _ in range(2):
        books = audit(tmp_path)  # beside the living shard, then without it
        assert books.findings == ()
        assert (books.inserted, books.live, books.evicted) == (1000, 1000, 0)
        assert set(books.rows.values()) == {500}
        assert set(books.whole_from.values()) == {0}
        shard.close()


def test_rows_balance_that_other_shards_took_over(tmp_path: Path, open_shard: OpenShard) -> None:
    source, target = open_shard(0), open_shard(1)
    fill(source, 400)
    fill(target, 90)
    for _ in range(3):
        move.move(source, target, source.sealed()[0])
        books = audit(tmp_path)
        assert books.findings == ()
        assert (books.inserted, books.live, books.evicted) == (980, 980, 0)
        assert set(books.whole_from.values()) == {0}


def test_segment_at_both_ends_of_a_move_counts_once(tmp_path: Path, open_shard: OpenShard) -> None:
    source, target = open_shard(0), open_shard(1)
    fill(source, 300)
    assert target.adopt(source.sealed()[0].path) == 128
    books = audit(tmp_path)
    assert books.findings == ()
    assert (books.inserted, books.live) == (600, 600)


def test_a_missing_segment_of_any_tier_is_found(tmp_path: Path, open_shard: OpenShard) -> None:
    shard = open_shard(0, tiers=True)
    fill(shard, 500)
    shard.close()
    stored = next(s for s in layout.stored_segments(shard.directory) if s.tier == "cold")
    layout.remove((stored.path, layout.overlay_path(stored.path)))
    books = audit(tmp_path)
    assert {finding.kind for finding in books.findings} == {"missing"}
    assert books.rows_of("missing") == 128


def test_a_row_changed_under_a_cold_segment_is_found(tmp_path: Path, open_shard: OpenShard) -> None:
    shard = open_shard(0, tiers=True)
    fill(shard, 500)
    shard.close()
    stored = next(s for s in layout.stored_segments(shard.directory) if s.tier == "cold")
    steps = np.memmap(data_path(stored.path, "step", 2), "<i4", "r+")
    steps[20] = steps[19]
    steps.flush()
    assert {"doubled", "missing"} <= {finding.kind for finding in audit(tmp_path).findings}
    image = data_path(stored.path, "image", 5)
    data = bytearray(image.read_bytes())
    data[40] ^= 0xFF
    image.write_bytes(data)
    assert any(f.kind == "damaged" and "rows 0.." in f.what for f in audit(tmp_path).findings)


def test_rows_that_damage_took_are_not_missing(tmp_path: Path, open_shard: OpenShard) -> None:
    shard = open_shard(0)
    fill(shard, 500)
    stored = layout.stored_segments(shard.directory)[2]
    file = data_path(stored.path, "image", 5)
    with file.open("r+b") as opened:
        opened.write(b"\xff" * 64)
    report_damage(stored.path, "a test")
    shard.scrub()
    assert shard.settle(30.0)
    assert shard.lost_rows == 128
    books = audit(tmp_path)
    assert books.findings == ()
    assert (books.inserted, books.live, books.evicted, books.damaged) == (1000, 872, 128, 128)
    assert set(books.whole_from.values()) == {1}  # something of the first life is gone


def test_rows_that_fell_out_of_the_middle_are_missing(tmp_path: Path, open_shard: OpenShard) -> None:
    shard = open_shard(0)
    fill(shard, 500)
    shard.close()
    stored = layout.stored_segments(shard.directory)[2]
    layout.remove((stored.path, layout.overlay_path(stored.path)))
    books = audit(tmp_path)
    assert books.rows_of("missing") == 128
    assert any("do not meet" in finding.what for finding in books.findings)
