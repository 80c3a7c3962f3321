"""Ranks that torchrun starts: offers are taken once, by the right process, for the right run."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local import LocalFleet
from deploy.offers import OfferedRole, claim
from deploy.roles import RoleSpec
from deploy.torchrun import claim_from_living, rank_of, why_not
from system.errors import ConfigError


def spec(run_dir: Path, incarnation: int = 1) -> RoleSpec:
    return RoleSpec(
        role="learner", index=1, incarnation=incarnation, run_dir=str(run_dir), config={}, env_spec={},
        extra={"secret": "s"},
    )  # fmt: skip


def say(run_dir: Path, pid: int, incarnation: int = 1, *, seconds_ago: float = 0.0) -> None:
    """As a role does in its status file."""
    (run_dir / "status").mkdir(exist_ok=True)
    when = time.time() - seconds_ago
    record = {"pid": pid, "incarnation": incarnation, "state": "running", "time": when}
    (run_dir / "status" / "learner-1.json").write_text(json.dumps(record))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def test_offer_is_taken_once_and_read_by_its_owner_alone(tmp_path: Path):
    offered = OfferedRole(tmp_path, spec(tmp_path))
    path = tmp_path / "offers" / "learner-1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert claim(tmp_path, "learner-1", lambda: True) == spec(tmp_path)
    assert list(path.parent.iterdir()) == []  # the secret is gone from the disk
    asked = iter([True, False])
    assert claim(tmp_path, "learner-1", lambda: next(asked)) is None
    assert offered.poll() is None


def test_newer_life_replaces_an_offer_that_nobody_took(tmp_path: Path):
    OfferedRole(tmp_path, spec(tmp_path, 1))
    OfferedRole(tmp_path, spec(tmp_path, 2))
    taken = claim(tmp_path, "learner-1", lambda: True)
    assert taken is not None
    assert taken.incarnation == 2


def test_offer_of_a_driver_that_was_killed_is_thrown_away(tmp_path: Path, sleeper: subprocess.Popen[bytes]):
    killed = replace(spec(tmp_path, 1), extra={"secret": "s", "driver": sleeper.pid})
    OfferedRole(tmp_path, killed)
    sleeper.kill()
    sleeper.wait()
    asked = iter([True, True, False])
    assert claim_from_living(tmp_path, "learner-1", lambda: next(asked)) is None
    assert list((tmp_path / "offers").iterdir()) == []
    lives = replace(spec(tmp_path, 2), extra={"secret": "s", "driver": os.getpid()})
    OfferedRole(tmp_path, killed)
    OfferedRole(tmp_path, lives)
    assert claim_from_living(tmp_path, "learner-1", lambda: True) == lives


def test_withdrawn_offer_has_ended_and_is_not_taken(tmp_path: Path):
    offered = OfferedRole(tmp_path, spec(tmp_path))
    offered.terminate()
    assert offered.wait(1.0) == 0
    asked = iter([True, False])
    assert claim(tmp_path, "learner-1", lambda: next(asked)) is None


def test_role_lives_as_long_as_the_process_that_took_it(tmp_path: Path, sleeper: subprocess.Popen[bytes]):
    offered = OfferedRole(tmp_path, spec(tmp_path))
    claim(tmp_path, "learner-1", lambda: True)
    say(tmp_path, os.getpid(), incarnation=0)  # an earlier life
    assert offered.pid == 0
    say(tmp_path, sleeper.pid)
    assert offered.pid == sleeper.pid
    assert offered.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        offered.wait(0.0)
    offered.kill()
    assert sleeper.wait(20) == -9
    assert offered.poll() == 1


def test_stranger_with_the_number_of_a_role_that_ended_is_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
):
    offered = OfferedRole(tmp_path, spec(tmp_path))
    claim(tmp_path, "learner-1", lambda: True)
    say(tmp_path, sleeper.pid, seconds_ago=60.0)  # the sleeper began after that
    offered.terminate()
    offered.kill()
    assert offered.wait(1.0) == 1
    assert sleeper.poll() is None


def test_ranks_that_wait_for_torchrun_are_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = {"learner": {"launch": "torchrun"}}
    fleet = LocalFleet(tmp_path)
    fleet.launch(replace(spec(tmp_path), config=config))
    now = time.time()
    monkeypatch.setattr("deploy.local.time.time", lambda: now + 1000.0)
    assert fleet.statuses()["learner-1"].age == 0.0
    claim(tmp_path, "learner-1", lambda: True)
    assert fleet.statuses()["learner-1"].age == 0.0
    monkeypatch.setattr("deploy.local.time.time", lambda: now + 1060.0)
    assert fleet.statuses()["learner-1"].age == 60.0  # it came, and says nothing


def test_process_that_took_an_offer_and_never_spoke_can_be_given_up(tmp_path: Path):
    offered = OfferedRole(tmp_path, spec(tmp_path))
    claim(tmp_path, "learner-1", lambda: True)
    offered.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        offered.wait(0.0)
    offered.kill()
    assert offered.wait(1.0) == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "start this by torchrun"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "must be numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "must be from 0 to"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "use --nnodes 1"),
    ],
)
def test_process_that_is_no_rank_of_one_machine_is_refused(environment: dict[str, str], says: str):
    with pytest.raises(ConfigError, match=says):
        rank_of(environment)


def test_rank_and_ranks_come_from_the_environment():
    assert rank_of({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}) == (1, 2)
    assert rank_of({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1)


def test_run_for_another_number_of_ranks_says_how_to_fit(tmp_path: Path):
    assert why_not(tmp_path, 2) == ""  # no run yet
    (tmp_path / "run.json").write_text(json.dumps({"learner": {"launch": "torchrun", "ranks": 4}}))
    assert why_not(tmp_path, 4) == ""
    assert "learner.ranks=4, must have torchrun and 2; resume it with" in why_not(tmp_path, 2)
    (tmp_path / "run.json").write_text(json.dumps({"learner": {"launch": "backend", "ranks": 2}}))
    assert "--set learner.launch=torchrun --set learner.ranks=2" in why_not(tmp_path, 2)
