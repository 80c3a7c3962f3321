"""Damage of any file costs rows at most: the shard opens, nothing wrong is served, streams go on."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import damage
from replay import layout, seal, synthetic
from replay.ledger import read_ledger
from replay.quarantine import KEEP, quarantine, quarantined
from replay.segment import Segment
from replay.shard import ReplayShard
from system.errors import IntegrityError
from system.experience import StreamId
from system.metrics import Metrics

TABLE = synthetic.vector_table()
STREAMS = [StreamId(actor=0, env=0), StreamId(actor=0, env=1), StreamId(actor=3, env=0)]
LENGTHS = (500, 130, 40)


def open_shard(root: Path, capacity_rows: int = 4096, **options: Any) -> ReplayShard:
    return ReplayShard(root, 0, TABLE, capacity_rows=capacity_rows, segment_rows=128, **options)


def filled(root: Path, *, settle: bool = True) -> Path:
    """A replay of sealed segments and growing ones, as a killed owner leaves it."""
    shard = open_shard(root)
    for start in range(0, max(LENGTHS), 30):
        for stream, length in zip(STREAMS, LENGTHS, strict=True):
            if start < length:
                shard.append([synthetic.rows(TABLE, stream, start, min(30, length - start))], 5.0)
    if settle:
        assert shard.settle(20.0)
    shard.close()
    return layout.shard_dir(root, 0)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "replay"
    filled(root)
    return root


def kinds(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for victim in damage.victims(root):
        found.setdefault(victim.kind, []).append(victim.path)
    return found


def test_a_filled_replay_has_files_of_every_kind(original: Path) -> None:
    assert kinds(original).keys() >= {
        "table", "shard", "ledger", "ledger copy", "catalog", "verified", "manifest", "group metadata",
        "array metadata", "commit words", "slots", "checks", "rows", "overlay rows", "overlay checks",
        "overlay group metadata", "overlay array metadata",
    }  # fmt: skip
    assert damage.read_all(original, TABLE).rows == sum(LENGTHS)


@pytest.mark.parametrize("how", damage.DAMAGES)
def test_no_damage_of_any_file_serves_a_wrong_row_or_stops_a_stream(
    tmp_path: Path, original: Path, how: str
) -> None:
    rng = random.Random(how)
    for serial, (kind, paths) in enumerate(kinds(original).items()):
        if kind == "table":
            continue
        root = tmp_path / str(serial)
        damage.copy_replay(original, root)
        victim = root / rng.choice(paths).relative_to(original)
        damage.DAMAGES[how](victim, rng)
        offline = damage.read_all(root, TABLE)
        assert not offline.wrong, (kind, victim, offline.wrong)
        shard = open_shard(root)
        assert shard.settle(20.0)
        served = damage.read_all(root, TABLE)
        assert not served.wrong, (kind, victim, served.wrong)
        if kind.startswith("ledger") or kind in ("shard", "catalog", "verified"):
            assert served.rows == shard.stats().rows == sum(LENGTHS), (kind, victim)
        assert shard.stats().inserted >= served.rows
        for stream, length in zip(STREAMS, LENGTHS, strict=True):
            ack = shard.append([synthetic.rows(TABLE, stream, max(0, length - 5), 35)], 5.0)
            assert ack.committed >= 30, (kind, victim, stream)
        again = damage.read_all(root, TABLE)
        assert not again.wrong, (kind, victim, again.wrong)
        for stream, length in zip(STREAMS, LENGTHS, strict=True):
            assert again.numbers[stream.actor, stream.env] >= set(range(length, length + 30)), (kind, victim)
        shard.close()


def test_a_lost_ledger_is_rebuilt_from_the_segments(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    for path in damage.ledger_files(directory):
        path.write_text("{")
    shard = open_shard(tmp_path)
    assert (shard.stats().inserted, shard.stats().rows) == (sum(LENGTHS), sum(LENGTHS))
    ack = shard.append([synthetic.rows(TABLE, STREAMS[0], 490, 20)], 5.0)
    assert (ack.committed, ack.duplicates) == (10, 10)
    shard.close()


def test_damaged_rows_are_cut_off_after_power_loss_and_the_stream_goes_on(tmp_path: Path) -> None:
    directory = filled(tmp_path, settle=False)
    damage.power_loss(tmp_path, random.Random(1), 0.3)
    metrics = Metrics("run", "replay", 0)
    shard = open_shard(tmp_path, metrics=metrics)
    assert shard.settle(20.0)
    served = damage.read_all(tmp_path, TABLE)
    assert not served.wrong
    assert served.rows < sum(LENGTHS)
    assert metrics.value("replay_rows_lost_total") > 0
    assert shard.stats().inserted == sum(LENGTHS)
    for stream, length in zip(STREAMS, LENGTHS, strict=True):
        assert shard.append([synthetic.rows(TABLE, stream, length, 10)], 5.0).committed == 10
    shard.close()
    assert quarantined(directory)


def test_repeated_power_loss_serves_nothing_wrong_and_counts_every_row(tmp_path: Path) -> None:
    rng, sent = random.Random(7), dict.fromkeys(STREAMS, 0)
    for _ in range(6):
        shard = open_shard(tmp_path)
        for _ in range(rng.randrange(1, 15)):
            stream, count = rng.choice(STREAMS), rng.randrange(1, 90)
            ack = shard.append([synthetic.rows(TABLE, stream, sent[stream], count)], 5.0)
            assert ack.committed == count
            sent[stream] += count
        shard.close()
        damage.power_loss(tmp_path, rng, rng.choice((0.02, 0.2, 0.7)))
        shard = open_shard(tmp_path)
        assert shard.settle(20.0)
        assert shard.stats().inserted == sum(sent.values())
        assert not damage.read_all(tmp_path, TABLE).wrong
        shard.close()


def test_the_same_boot_keeps_every_row(tmp_path: Path) -> None:
    filled(tmp_path, settle=False)
    shard = open_shard(tmp_path)
    assert shard.stats().rows == sum(LENGTHS)
    assert shard.settle(20.0)
    assert damage.read_all(tmp_path, TABLE).rows == sum(LENGTHS)
    shard.close()


def test_lost_commit_words_are_found_again_by_the_checks(tmp_path: Path) -> None:
    directory = filled(tmp_path, settle=False)
    for path in layout.segment_paths(directory).values():
        if not seal.is_sealed(path):
            words = path / "committed/c/0"
            words.write_bytes(bytes(words.stat().st_size))
    damage.another_boot(directory)
    shard = open_shard(tmp_path)
    assert shard.stats().rows == sum(LENGTHS)
    shard.close()


def test_a_segment_of_another_run_goes_into_quarantine(tmp_path: Path) -> None:
    here, there = filled(tmp_path / "a"), filled(tmp_path / "b")
    name = sorted(layout.segment_paths(here).values())[1].name
    damage.swap_segments(here / name, there / name)
    metrics = Metrics("run", "replay", 0)
    shard = open_shard(tmp_path / "a", metrics=metrics)
    assert shard.settle(20.0)
    assert metrics.value("replay_segments_quarantined_total", reason="schema") == 1
    assert not damage.read_all(tmp_path / "a", TABLE).wrong
    assert [path.name for path in quarantined(here)] == [f"{name}-schema"]
    shard.close()


def test_a_segment_under_another_name_goes_into_quarantine(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    first, second, *_ = sorted(layout.segment_paths(directory).values())
    damage.swap_segments(first, second)
    shard = open_shard(tmp_path)
    assert shard.settle(20.0)
    served = damage.read_all(tmp_path, TABLE)
    assert not served.wrong
    assert 0 < served.rows < sum(LENGTHS)
    shard.close()


def test_a_scrub_takes_damage_out_while_rows_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path)
    metrics = Metrics("run", "replay", 0)
    shard = open_shard(tmp_path, metrics=metrics)
    assert shard.settle(20.0)
    victim = shard.sealed()[1].path
    damage.flip(victim / "reward/c/0/0", random.Random(0))
    lost = sum(seal.read_manifest(victim).committed)
    before = shard.stats()
    with caplog.at_level(logging.ERROR):
        shard.scrub()
        assert shard.settle(20.0)
    assert "replay segment quarantined" in caplog.text
    assert not victim.exists()
    after = shard.stats()
    assert (after.rows, after.inserted) == (before.rows - lost, before.inserted)
    assert metrics.value("replay_segments_quarantined_total", reason="checksum") == 1
    assert metrics.value("replay_rows_lost_total") == lost
    assert shard.append([synthetic.rows(TABLE, STREAMS[0], 500, 10)], 5.0).committed == 10
    assert damage.read_all(tmp_path, TABLE).rows == after.rows + 10
    shard.close()


def test_damaged_overlay_rows_become_the_initial_latents(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    path = next(iter(layout.segment_paths(directory).values()))
    segment = Segment.open(path, TABLE)
    segment.overlay["latent"][0, 3] ^= 1
    assert segment.mend_overlay() == 1
    assert not segment.overlay["latent"][0, 3].any()
    assert segment.overlay["latent"][0, 4].any()
    assert segment.mend_overlay() == 0


def test_a_damaged_table_is_refused_and_a_lost_one_is_made_again(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    table = tmp_path / "table.json"
    text = table.read_text()
    table.write_text(text[:50])
    with pytest.raises(IntegrityError, match=r"table\.json"):
        open_shard(tmp_path)
    table.unlink()
    shard = open_shard(tmp_path)
    assert shard.stats().rows == sum(LENGTHS)
    assert table.read_text() == text
    shard.close()
    assert not quarantined(directory)


def test_quarantine_keeps_only_the_newest(tmp_path: Path) -> None:
    for number in range(KEEP + 3):
        segment = tmp_path / layout.segment_name(number, 1)
        segment.mkdir()
        layout.overlay_path(segment).mkdir()
        quarantine(tmp_path, segment, "test", "a test")
    assert len(quarantined(tmp_path)) == KEEP
    assert len(list((tmp_path / layout.QUARANTINE).iterdir())) == 2 * KEEP


def test_a_ledger_survives_in_its_copy(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    (directory / "ledger.json").write_text("no json")
    ledger, wrong = read_ledger(directory)
    assert ledger is not None
    assert ledger.epoch == 1
    assert len(wrong) == 1


def test_manifests_tell_what_a_segment_holds(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    for path in layout.segment_paths(directory).values():
        if seal.is_sealed(path):
            manifest = seal.read_manifest(path)
            assert seal.verify(path) == []
            segment = Segment.open(path, TABLE)
            np.testing.assert_array_equal(manifest.committed, segment.committed)
            np.testing.assert_array_equal(manifest.slots, segment.slots)
