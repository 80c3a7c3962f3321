import json
import os
from pathlib import Path

import pytest

from replay import layout, synthetic
from replay.shard import ReplayShard
from system.errors import ConfigError, IntegrityError, PreflightError, SchemaError
from system.experience import StreamId
from system.specs import ArraySpec, TableSpec

TABLE = synthetic.vector_table()
STREAM = StreamId(actor=0, env=0)


def open_shard(root: Path, index: int = 0, **changes: int) -> ReplayShard:
    return ReplayShard(root, index, TABLE, **{"capacity_rows": 1024, **changes})


def test_the_schema_is_written_once_and_found_again(tmp_path: Path) -> None:
    layout.open_table(tmp_path / "r", TABLE)
    layout.open_table(tmp_path / "r", TABLE)
    stored = json.loads((tmp_path / "r" / "table.json").read_text())
    assert TableSpec.from_json(stored["table"]).digest == TABLE.digest == stored["digest"]
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["table.json"]


def test_another_schema_is_refused_naming_both_and_the_difference(tmp_path: Path) -> None:
    layout.open_table(tmp_path, TABLE)
    other = synthetic.vector_table(5)
    with pytest.raises(SchemaError) as refused:
        layout.open_table(tmp_path, other)
    message = str(refused.value)
    assert TABLE.digest[:12] in message
    assert other.digest[:12] in message
    assert "column vector stored as float32[4] vector, wanted as float32[5] vector" in message
    assert f"dreamfleet replay migrate {tmp_path} NEW --drop vector" in message


@pytest.mark.parametrize(
    "text", ["", '{"format": 1, "dig', "[]", '{"format": 1, "digest": "x", "table": {}}']
)
def test_a_damaged_table_file_is_an_integrity_error(tmp_path: Path, text: str) -> None:
    layout.open_table(tmp_path, TABLE)
    (tmp_path / "table.json").write_text(text)
    with pytest.raises((IntegrityError, SchemaError), match=r"table\.json"):
        layout.open_table(tmp_path, TABLE)


def test_a_tampered_schema_is_an_integrity_error(tmp_path: Path) -> None:
    layout.open_table(tmp_path, TABLE)
    text = (tmp_path / "table.json").read_text()
    (tmp_path / "table.json").write_text(text.replace('"classes": 4', '"classes": 5'))
    with pytest.raises(IntegrityError, match="digest it names"):
        layout.open_table(tmp_path, TABLE)


def test_a_format_from_the_future_is_refused(tmp_path: Path) -> None:
    layout.open_table(tmp_path, TABLE)
    text = (tmp_path / "table.json").read_text()
    (tmp_path / "table.json").write_text(text.replace('"format": 2', '"format": 99'))
    with pytest.raises(SchemaError, match="format 99"):
        layout.open_table(tmp_path, TABLE)


def test_a_root_that_is_a_file_is_a_preflight_error(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    with pytest.raises(PreflightError, match="cannot be made"):
        layout.open_table(tmp_path / "r", TABLE)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory nobody may write")
def test_a_read_only_root_is_a_preflight_error() -> None:
    with pytest.raises(PreflightError, match="cannot be made"):
        layout.open_table(Path("/proc/replay"), TABLE)


def test_a_shard_has_one_owner(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    with pytest.raises(PreflightError, match=f"owned by process {os.getpid()}"):
        open_shard(tmp_path)
    shard.close()
    open_shard(tmp_path).close()


@pytest.mark.parametrize(
    ("capacity", "segment"), [(100, None), (1024, 63), (1024, 100), (1024, 576), (1024, 0)]
)
def test_impossible_geometry_is_refused(tmp_path: Path, capacity: int, segment: int | None) -> None:
    with pytest.raises(ConfigError):
        ReplayShard(tmp_path / "r", 0, TABLE, capacity_rows=capacity, segment_rows=segment)
    assert not (tmp_path / "r").exists()


def test_a_column_without_entries_is_refused(tmp_path: Path) -> None:
    table = TableSpec(columns={**TABLE.columns, "none": ArraySpec(shape=(0,), dtype="float32")}, overlay={})
    with pytest.raises(SchemaError, match="none"):
        ReplayShard(tmp_path, 0, table, capacity_rows=1024)
    assert not layout.shard_dir(tmp_path, 0).exists()
