"""`dreamfleet replay ls|stats|verify|repair`: offline, beside a live shard, and on a damaged replay."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import damage
from deploy.__main__ import cli
from replay import layout, synthetic
from replay.shard import ReplayShard
from system.errors import IntegrityError, PreflightError
from system.experience import StreamId

TABLE = synthetic.vector_table()
STREAM = StreamId(actor=0, env=0)
ROWS = 700


def open_shard(root: Path) -> ReplayShard:
    return ReplayShard(root, 0, TABLE, capacity_rows=4096, segment_rows=128)


def filled(root: Path) -> ReplayShard:
    shard = open_shard(root)
    for start in range(0, ROWS, 35):
        shard.append([synthetic.rows(TABLE, STREAM, start, 35)], 5.0)
    assert shard.settle(20.0)
    return shard


def run(*words: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["replay", *map(str, words), "--json"], standalone_mode=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return json.loads(result.output)


def test_commands_look_at_a_live_replay(tmp_path: Path) -> None:
    shard = filled(tmp_path / "replay")
    segments = run("ls", tmp_path)["segments"]
    assert sum(line["rows"] for line in segments) == ROWS
    assert {line["state"] for line in segments} == {"sealed", "growing"}
    (sums,) = run("stats", tmp_path)["shards"]
    assert (sums["rows"], sums["owned"], sums["lost_rows"]) == (ROWS, True, 0)
    assert run("verify", tmp_path)["rows"] == ROWS
    with pytest.raises(PreflightError, match="owned by process"):
        run("repair", tmp_path)
    shard.close()
    text = CliRunner().invoke(cli, ["replay", "ls", str(tmp_path)], standalone_mode=False).output
    assert "00000000-e0001.zarr" in text


def test_repair_cuts_a_damaged_segment_back_and_says_what_is_lost(tmp_path: Path) -> None:
    filled(tmp_path).close()
    path = sorted(layout.segment_paths(layout.shard_dir(tmp_path, 0)).values())[2]
    words = bytearray((path / "reward/c/0/0").read_bytes())
    words[4 * 100] ^= 1  # a row in the second slot
    (path / "reward/c/0/0").write_bytes(bytes(words))
    found = run("verify", tmp_path, code=5)["findings"]
    assert [finding["reason"] for finding in found] == ["checksum"]
    done = run("repair", tmp_path)
    assert 0 < done["lost"] < 128
    assert done["rows"] == ROWS - done["lost"]
    assert run("verify", tmp_path)["rows"] == done["rows"]
    served = damage.read_all(tmp_path, TABLE)
    assert not served.wrong
    assert served.rows == done["rows"]


def test_repair_saves_what_it_can_from_quarantine(tmp_path: Path) -> None:
    filled(tmp_path).close()
    path = sorted(layout.segment_paths(layout.shard_dir(tmp_path, 0)).values())[1]
    words = bytearray((path / "reward/c/0/0").read_bytes())
    words[4 * 127] ^= 1  # the last row
    (path / "reward/c/0/0").write_bytes(bytes(words))
    shard = open_shard(tmp_path)
    assert shard.settle(20.0)
    assert shard.stats().rows == ROWS - 128
    shard.close()
    assert {line["state"] for line in run("ls", tmp_path)["segments"]} >= {"quarantined"}
    done = run("repair", tmp_path)
    assert ROWS - 35 <= done["rows"] < ROWS
    assert done["returned"] == done["rows"] - (ROWS - 128)
    shard = open_shard(tmp_path)
    assert shard.stats().inserted == ROWS
    assert not damage.read_all(tmp_path, TABLE).wrong
    shard.close()


def test_repair_makes_the_table_again_from_what_segments_carry(tmp_path: Path) -> None:
    filled(tmp_path).close()
    before = (tmp_path / "table.json").read_text()
    damage.garbage(tmp_path / "table.json", random.Random(0))
    assert run("verify", tmp_path, code=5)["findings"][0]["reason"] == "table"
    assert run("repair", tmp_path)["rows"] == ROWS
    assert (tmp_path / "table.json").read_text() == before
    assert run("verify", tmp_path)["rows"] == ROWS


def test_repair_refuses_when_nothing_carries_the_schema(tmp_path: Path) -> None:
    filled(tmp_path).close()
    (tmp_path / "table.json").write_text("{")
    for path in layout.segment_paths(layout.shard_dir(tmp_path, 0)).values():
        (path / "zarr.json").write_text("{")
    with pytest.raises(IntegrityError, match="no segment carries"):
        run("repair", tmp_path)
