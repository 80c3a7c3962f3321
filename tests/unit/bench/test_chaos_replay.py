"""The judges of the replay drills see what they are for, and a few real trials pass them."""

import json
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bench import chaos_replay, damage, replay_faults, replay_kills, replay_lives
from bench.chaos_replay import faults, tables, write_results
from bench.damage import read_all
from bench.replay_batches import Known, draw
from bench.replay_faults import Damages, Fill
from bench.replay_kills import Case, Toll
from bench.replay_lives import ACKS, REPLAY, TABLE, open_shard
from replay import layout, synthetic
from replay.checks import place_of
from replay.chunk_codec import choose
from replay.segment import Segment
from system.experience import StreamId

ROWS = 100
STREAM = StreamId(actor=0, env=0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A replay whose only stream has ROWS rows, all acknowledged, in a segment that still grows."""
    with closing(open_shard(tmp_path / REPLAY, 0, replay_kills.KEEPING)) as shard:
        shard.append([synthetic.rows(TABLE, STREAM, 0, ROWS)], 10.0)
    (tmp_path / ACKS).write_text(f"0 {ROWS}\n")
    return tmp_path


def judged(home: Path, capacity_rows: int = replay_kills.KEEPING) -> Toll:
    toll = Toll()
    replay_kills.judge(home, Case(victim="own", capacity_rows=capacity_rows), toll, Known(TABLE))
    return toll


def forge(home: Path, change: Callable[[Segment], None]) -> None:
    """Change rows of the first slot and make its checksum right again, as only a fault of ours could."""
    path = layout.segment_paths(layout.shard_dir(home / REPLAY, 0))[0]
    segment = Segment.open(path, TABLE, writable=True)
    change(segment)
    used = int(segment.committed[0])
    for name in ("verified.json", "flushed.json"):
        (path.parent / name).unlink(missing_ok=True)
    segment.check[0] = 0
    crc = segment._append_check.of(segment.slot_columns(0), 0, used, place_of(segment.slots[0], 0))
    segment.check[0, used - 1] = (crc, used)
    segment.check_overlay(0, used)


def test_a_sound_replay_passes(home: Path) -> None:
    toll = judged(home)
    assert (toll.lost, toll.doubled, toll.torn) == (0, 0, 0)
    assert toll.sequences == 20 * 16


def test_a_wrong_row_is_seen_in_rows_and_batches(home: Path) -> None:
    def change(segment: Segment) -> None:
        segment.columns["vector"][0, 30] += 1

    forge(home, change)
    assert len(read_all(home / REPLAY, TABLE).wrong) == 1
    assert draw(home / REPLAY, Known(TABLE), 20, 0).wrong
    assert judged(home).torn > 1


def test_strange_latents_are_seen(home: Path) -> None:
    def change(segment: Segment) -> None:
        segment.overlay["latent"][0, 30] = (1, 2)

    forge(home, change)
    assert len(read_all(home / REPLAY, TABLE).wrong) == 1
    assert judged(home).torn > 1


def test_latents_that_were_written_back_or_reset_are_no_fault(home: Path) -> None:
    def change(segment: Segment) -> None:
        segment.overlay["latent"][0, 30:40] = 7
        segment.overlay["latent"][0, 40:50] = 0

    forge(home, change)
    assert judged(home).torn == 0


def test_rows_out_of_order_are_seen(home: Path) -> None:
    def change(segment: Segment) -> None:
        for array in segment.columns.values():
            array[0, [20, 21]] = array[0, [21, 20]]

    forge(home, change)
    assert judged(home).torn > 1


def test_doubled_rows_are_seen(home: Path) -> None:
    with closing(open_shard(home / REPLAY, 1, replay_kills.KEEPING)) as other:
        other.append([synthetic.rows(TABLE, STREAM, 0, 10)], 10.0)
    toll = judged(home)
    assert (toll.lost, toll.doubled, toll.torn) == (0, 10, 0)


@pytest.mark.parametrize("capacity_rows", [replay_kills.KEEPING, replay_kills.EVICTING])
def test_lost_rows_are_seen(home: Path, capacity_rows: int) -> None:
    (home / ACKS).write_text(f"0 {ROWS + 3}\n1 4\n")
    assert judged(home, capacity_rows).lost >= 3


def test_an_eviction_is_no_loss_but_more_than_the_capacity_is() -> None:
    numbers = {(0, 0): frozenset(range(1500, 3200))}
    served = damage.Served(rows=1700, numbers=numbers, wrong=())
    assert replay_kills.lost_rows(served, {0: 3200}, 2048) == 0
    assert replay_kills.lost_rows(served, {0: 3200}, replay_kills.KEEPING) == 1500
    few = damage.Served(rows=200, numbers={(0, 0): frozenset(range(3000, 3200))}, wrong=())
    assert replay_kills.lost_rows(few, {0: 3200}, 2048) > 1000


@pytest.mark.drill
def test_a_kill_costs_nothing(tmp_path: Path) -> None:
    toll = replay_kills.kill_case("shard: append, seal, compress", 2, 3, tmp_path)
    assert (toll.kills, toll.lost, toll.doubled, toll.torn) == (2, 0, 0, 0)
    assert toll.acknowledged > 0


def test_corruptions_are_contained(tmp_path: Path) -> None:
    found = replay_faults.corrupt(6, 1, tmp_path)
    assert sum(one.injected for one in found.values()) == 6
    assert not faults({}, found, [])
    assert sum(one.sequences for one in found.values()) > 0


@pytest.mark.drill
def test_a_segment_of_another_run_is_contained_in_every_tier(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    replay_faults.make_template(ours, 0)
    replay_faults.make_template(theirs, replay_faults.STRANGER)
    assert damage.read_all(theirs / REPLAY, TABLE).rows == 3 * replay_faults.ROWS
    found = Damages()
    for serial, pattern in enumerate(replay_faults.SWAPS.values()):
        copy = tmp_path / str(serial)
        damage.copy_replay(ours / REPLAY, copy)
        replay_faults.swap(copy, theirs / REPLAY, pattern, random.Random(serial))
        replay_faults.judge(copy, 3 * replay_faults.ROWS, found, Known(TABLE), pattern)
    assert (found.served, found.crashed, found.stopped, found.refused) == (0, 0, 0, 0)
    assert max(found.rows_lost) <= replay_lives.SEGMENT_ROWS


def test_a_stranger_in_the_damaged_replay_is_seen(home: Path) -> None:
    with closing(open_shard(home / REPLAY, 0, replay_kills.KEEPING)) as shard:
        shard.append([synthetic.rows(TABLE, StreamId(actor=replay_faults.STRANGER, env=0), 0, 9)], 10.0)
    found = Damages()
    replay_faults.judge(home / REPLAY, ROWS, found, Known(TABLE), "by hand")
    assert found.served + found.stopped > 0


def figures() -> dict[str, object]:
    return {
        "command": "python -m bench chaos_replay",
        "seconds": {"kills": 10.0, "corruptions": 20.0},
        "foreign_load": 0.1,
        "kills": {
            "shard": dict.fromkeys(Toll.__dataclass_fields__, 0) | {"kills": 5, "acknowledged": 99},
            "writer": dict.fromkeys(Toll.__dataclass_fields__, 1),
        },
        "corruptions": {
            "rows": dict.fromkeys(Damages.__dataclass_fields__, 2) | {"rows_lost": [1, 2, 9]},
        },
        "fills": [
            {"exit_code": 0, "refused": "full", "kept": True},
            {"exit_code": -7, "refused": "", "kept": False},
        ],
    }


def test_the_tables_hold_every_case_and_their_sums(tmp_path: Path) -> None:
    write_results(tmp_path / "figures.json", figures())
    lines = tables(json.loads((tmp_path / "figures.json").read_text())).splitlines()
    assert "| shard | 5 | 99 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |" in lines
    assert "| all | 6 | 100 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in lines
    assert "| rows | 2 | 2 | 2 | 2 | 2 | 2 | 2 | 9 |" in lines
    assert "| 2 | 1 | 1 |" in lines


def test_every_broken_promise_is_named() -> None:
    sound = Fill(exit_code=0, refused="no space", kept=True)
    assert faults({"shard": Toll()}, {"rows": Damages(refused=3)}, [sound]) == []
    assert len(faults({"a": Toll(lost=1), "b": Toll(doubled=1), "c": Toll(torn=1)}, {}, [])) == 3
    assert (
        len(faults({}, {"a": Damages(served=1), "b": Damages(crashed=1), "c": Damages(stopped=1)}, [])) == 3
    )
    bad = [Fill(exit_code=-7, refused="x", kept=True), Fill(exit_code=0, refused="x", kept=False)]
    assert len(faults({}, {}, bad)) == 2


def test_the_page_shows_the_kept_figures() -> None:
    page = chaos_replay.RELIABILITY.read_text()
    assert page.count("<!-- chaos-replay begin -->") == page.count("<!-- chaos-replay end -->") == 1
    results = chaos_replay.RESULTS / "chaos-replay.json"
    if results.exists():
        assert tables(json.loads(results.read_text())) in page


def test_the_table_has_columns_of_every_codec() -> None:
    chunk = synthetic.rows(TABLE, STREAM, 0, 64).columns
    found = {
        choose(np.ascontiguousarray(v).view(np.uint8).reshape(1, -1), v[0].nbytes) for v in chunk.values()
    }
    assert found == {"plain", "checked", "packed"}
