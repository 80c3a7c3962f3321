"""What actors say was acknowledged is set against what is stored; a shortage is named."""

from pathlib import Path

import pytest

from deploy.audit import audit_run
from deploy.run_dir import RunDirectory
from replay import synthetic
from replay.shard import ReplayShard
from system.errors import ConfigError
from system.experience import StreamId

TABLE = synthetic.vector_table()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    """A run whose actor 3 stored 40 rows in its first life and 20 in its second, over two streams."""
    run = RunDirectory(tmp_path / "run").create()
    run.write_json(run.config_file, {})
    shard = ReplayShard(run.replay, 0, TABLE, capacity_rows=4096)
    for incarnation, rows in ((1, 20), (2, 10)):
        shard.append([life(env, incarnation, rows) for env in (0, 1)], 5.0)
    shard.close()
    run.release()
    return run


def life(env: int, incarnation: int, rows: int, start: int = 0):
    chunk = synthetic.rows(
        TABLE, StreamId(actor=3, env=env), start, rows, incarnation=incarnation, episode_length=2000
    )
    chunk.columns["policy_version"][:] = incarnation
    return chunk


def report(run: RunDirectory, state: str, incarnation: int, **payload: int) -> None:
    record = {"role": "actor", "index": 3, "incarnation": incarnation, "state": state, "pid": 1}
    run.write_json(run.status / "actor-3.json", {**record, "payload": payload})


def test_books_of_two_lives_balance(run_dir: RunDirectory) -> None:
    run_dir.event("role lost", role="actor-3", incarnation=1, rows=44, acknowledged=32)
    report(run_dir, "running", 2, rows=24, acknowledged=20)
    audit = audit_run(run_dir.path)
    assert audit.balanced
    assert (audit.acknowledged, audit.lost, audit.doubled, audit.missing) == (52, 0, 0, 0)
    assert audit.unsent == 4 + 4
    assert [(a.incarnation, a.made, a.acknowledged, a.stored) for a in audit.lives] == [
        (1, 44, 32, 40), (2, 24, 20, 20),
    ]  # fmt: skip
    assert "balanced" in audit.text()


def test_acknowledged_row_that_is_not_stored_is_lost(run_dir: RunDirectory) -> None:
    run_dir.event("role lost", role="actor-3", incarnation=1, rows=44, acknowledged=41)
    audit = audit_run(run_dir.path)
    assert not audit.balanced
    assert audit.lost == 1
    assert "41 rows were acknowledged, 40 are stored" in audit.text()


def test_life_that_stopped_must_have_all_it_made_stored(run_dir: RunDirectory) -> None:
    run_dir.event("role stopped", role="actor-3", incarnation=1, rows=41, acknowledged=30, lost=1)
    assert audit_run(run_dir.path).balanced
    run_dir.event("role stopped", role="actor-3", incarnation=2, rows=25, acknowledged=20, lost=2)
    assert audit_run(run_dir.path).lost == 3


def test_life_of_which_nothing_is_stored_is_noticed(run_dir: RunDirectory) -> None:
    run_dir.event("role left behind", role="actor-3", incarnation=3, state="running", rows=9, acknowledged=9)
    assert audit_run(run_dir.path).lost == 9


def test_evicted_lives_are_judged_by_what_was_ever_inserted(run_dir: RunDirectory) -> None:
    shard = ReplayShard(run_dir.replay, 0, TABLE, capacity_rows=4096)
    for start in range(0, 6000, 60):
        shard.append([life(env, 3, 60, start) for env in (0, 1)], 5.0)
    shard.close()
    run_dir.event("role lost", role="actor-3", incarnation=1, rows=40, acknowledged=40)
    run_dir.event("role lost", role="actor-3", incarnation=3, rows=12000, acknowledged=12000)
    audit = audit_run(run_dir.path)
    assert audit.evicted > 60
    assert audit.balanced
    run_dir.event("role lost", role="actor-3", incarnation=2, rows=40, acknowledged=30)
    assert audit_run(run_dir.path).lost == 10


def test_place_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        audit_run(tmp_path)
