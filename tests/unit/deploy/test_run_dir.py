"""A run directory has one driver, atomic files and growing incarnations."""

from pathlib import Path

import pytest

from deploy.run_dir import RunDirectory, read_json, write_atomic
from system.errors import ConfigError, IntegrityError, PreflightError


def test_a_second_driver_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run").create()
    with pytest.raises(ConfigError, match="driven by another process"):
        RunDirectory(tmp_path / "run").create()
    first.release()
    RunDirectory(tmp_path / "run").create().release()


def test_incarnations_grow_over_drivers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run").create()
    assert [run.next_incarnation("actor", 0) for _ in range(3)] == [1, 2, 3]
    run.release()
    again = RunDirectory(tmp_path / "run").create()
    assert again.next_incarnation("actor", 0) == 4
    assert again.next_incarnation("actor", 1) == 1
    again.release()


def test_a_path_that_cannot_be_made_is_a_preflight_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="choose a writable place"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "1")
    with pytest.raises(PreflightError, match="cannot write"):
        write_atomic(tmp_path / "absent" / "a.json", "2")
    assert path.read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_torn_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(IntegrityError, match=r"run\.json is unreadable"):
        read_json(tmp_path / "run.json")
    with pytest.raises(ConfigError, match="is not a run directory"):
        RunDirectory(tmp_path / "absent").config()
