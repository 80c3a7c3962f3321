"""Learner ranks in a run: settings that fit, one fate for all ranks, and who is said to be the cause."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.driver import Driver
from deploy.fleet import RoleStatus
from deploy.rank_group import LONGEST_SECONDS, Mourning, awaited, culprit, meeting_place
from deploy.roles import RoleSpec
from deploy.run_config import compose
from deploy.run_dir import RunDirectory
from system.errors import ConfigError, InfrastructureError
from system.specs import ActionSpec, EnvSpec

ENV = EnvSpec(name="toy:x", obs={}, action=ActionSpec(kind="discrete", classes=(2,)))
RUNNING = RoleStatus(state="running", age=0.0, address="127.0.0.1:1")
KILLED = RoleStatus(state="failed", age=0.0, error="ended by signal SIGKILL", exit_code=-9)
BEREFT = RoleStatus(state="failed", age=0.0, error="learner rank 1 is lost: it is silent", exit_code=6)


class RememberingFleet:
    """A Fleet in memory: roles run from launch on and say what the test puts into `words`."""

    def __init__(self) -> None:
        self.launched: list[RoleSpec] = []
        self.killed: list[str] = []
        self.words: dict[str, RoleStatus] = {}

    def launch(self, spec: RoleSpec) -> None:
        self.launched.append(spec)
        self.words[spec.key] = RUNNING

    def statuses(self) -> dict[str, RoleStatus]:
        return dict(self.words)

    def stop(self, key: str, timeout: float) -> RoleStatus:
        return self.words[key]

    def kill(self, key: str) -> None:
        self.killed.append(key)

    def close(self) -> None:
        return None

    def lives(self, key: str) -> list[RoleSpec]:
        return [spec for spec in self.launched if spec.key == key]


@pytest.fixture
def fleet() -> RememberingFleet:
    return RememberingFleet()


@pytest.fixture
def driver(fleet: RememberingFleet, tmp_path: Path) -> Iterator[Driver]:
    settings = ["actors.count=1", "replay.shards=1", "learner.ranks=2", "max_restarts=1"]
    config, _ = compose("cartpole", settings, {"root": str(tmp_path)})
    run_dir = RunDirectory(tmp_path / "run").create()
    driver = Driver(config, ENV, fleet, run_dir)
    driver.start()
    yield driver
    run_dir.release()


def relaunch(driver: Driver) -> None:
    """Let the pending relaunch be due now."""
    assert driver._relaunch_at
    driver._relaunch_at = dict.fromkeys(driver._relaunch_at, 0.0)
    driver.step(0.0)


def test_ranks_of_one_life_share_a_meeting_place_that_no_other_life_has(driver, fleet):
    first = [fleet.lives(f"learner-{rank}")[0] for rank in range(2)]
    assert first[0].extra == first[1].extra
    assert first[0].extra["ranks"] == 2
    assert len(first[0].extra["secret"]) >= 32
    fleet.words["learner-0"] = KILLED
    driver.step(0.0)
    relaunch(driver)
    second = [fleet.lives(f"learner-{rank}")[1] for rank in range(2)]
    assert second[0].extra == second[1].extra
    assert second[0].extra["secret"] != first[0].extra["secret"]
    assert all(spec.incarnation == 2 for spec in second)


def test_end_of_one_rank_is_the_end_of_all_and_counts_once(driver, fleet):
    fleet.words["learner-1"], fleet.words["learner-0"] = KILLED, BEREFT
    driver.step(0.0)
    relaunch(driver)
    assert [len(fleet.lives(f"learner-{rank}")) for rank in range(2)] == [2, 2]
    assert driver.progress.restarts == 1
    lost = [e for e in driver.run_dir.events() if e["event"] == "role lost"]
    assert [(e["role"], e["reason"]) for e in lost] == [("learner-1", KILLED.error)]


def test_rank_zero_may_save_before_it_is_ended_when_it_still_speaks(driver, fleet):
    fleet.words["learner-1"] = KILLED
    driver.step(0.0)
    assert not driver._relaunch_at
    assert fleet.killed == []
    fleet.words["learner-0"] = BEREFT
    driver.step(0.0)
    assert driver._relaunch_at


def test_rank_zero_may_save_at_every_loss(driver, fleet, monkeypatch):
    fleet.words["learner-1"] = KILLED
    driver.step(0.0)
    fleet.words["learner-0"] = BEREFT  # it has saved
    driver.step(0.0)
    relaunch(driver)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 2 * LONGEST_SECONDS)
    fleet.words["learner-1"] = KILLED
    driver.step(0.0)
    assert not driver._relaunch_at
    assert fleet.killed == []


def test_silent_rank_zero_is_ended_as_soon_as_another_names_it(driver, fleet):
    silent = driver.config.learner.rank_timeout + 0.1
    fleet.words["learner-1"] = BEREFT
    fleet.words["learner-0"] = RoleStatus(state="running", age=silent)
    driver.step(0.0)
    assert fleet.killed == ["learner-0"]
    assert driver._relaunch_at


def test_other_ranks_are_not_waited_for(driver, fleet):
    fleet.words["learner-0"] = BEREFT  # the stopped rank 1 itself says nothing
    driver.step(0.0)
    assert fleet.killed == ["learner-1"]
    relaunch(driver)
    assert len(fleet.lives("learner-1")) == 2


def test_fatal_error_of_any_rank_ends_the_run_with_its_code(driver, fleet):
    fleet.words["learner-0"] = BEREFT
    fleet.words["learner-1"] = RoleStatus(state="failed", age=0.0, error="no such card", exit_code=3)
    with pytest.raises(InfrastructureError, match="learner-1 failed: no such card") as caught:
        driver.step(0.0)
    assert caught.value.exit_code == 3


def test_all_ranks_have_one_restart_budget(driver, fleet):
    fleet.words["learner-1"], fleet.words["learner-0"] = KILLED, BEREFT
    driver.step(0.0)
    relaunch(driver)
    fleet.words["learner-0"] = KILLED
    with pytest.raises(InfrastructureError, match="learner-0 failed: ended by signal SIGKILL"):
        driver.step(0.0)


def test_culprit_is_who_died_by_itself():
    silent = RoleStatus(state="running", age=900.0)
    fatal = RoleStatus(state="failed", age=0.0, exit_code=4)
    assert culprit({"learner-0": BEREFT, "learner-1": KILLED}, {4}) == "learner-1"
    assert culprit({"learner-0": BEREFT, "learner-1": silent}, {4}) == "learner-1"
    assert culprit({"learner-0": KILLED, "learner-1": fatal}, {4}) == "learner-1"
    assert culprit({"learner-0": BEREFT, "learner-1": BEREFT}, {4}) == "learner-0"


def test_mourning_ends_however_well_rank_zero_seems():
    mourning = Mourning(silence=5.0)
    assert mourning.goes_on(RUNNING, now=100.0)
    assert mourning.goes_on(RUNNING, now=129.0)
    assert not mourning.goes_on(RUNNING, now=131.0)
    assert mourning.goes_on(RUNNING, now=140.0)  # the next loss
    assert not mourning.goes_on(RoleStatus(state="starting", age=0.0), now=141.0)  # it has nothing to save


def test_run_whose_ranks_nobody_started_says_the_command_for_it(tmp_path: Path):
    waiting = RoleStatus(state="starting", age=0.0)
    command = f"torchrun --nproc-per-node 2 --max-restarts 20 -m deploy.torchrun {tmp_path}"
    assert awaited("torchrun", 2, waiting, tmp_path) == command
    assert awaited("torchrun", 2, RoleStatus(state="starting", age=0.0, pid=7), tmp_path) == ""
    assert awaited("backend", 2, waiting, tmp_path) == ""


def test_single_rank_meets_nobody():
    assert meeting_place(1).keys() == {"driver"}


def test_learner_that_somebody_else_stopped_is_launched_again(driver, fleet):
    for rank in range(2):
        fleet.words[f"learner-{rank}"] = RoleStatus(state="stopped", age=0.0)
    driver.step(0.0)
    relaunch(driver)
    assert [len(fleet.lives(f"learner-{rank}")) for rank in range(2)] == [2, 2]
    lost = [e for e in driver.run_dir.events() if e["event"] == "role lost"]
    assert lost[0]["reason"] == "stopped by somebody else"


def test_batch_that_cannot_be_shared_is_refused_with_what_could():
    with pytest.raises(ConfigError) as caught:
        compose("cartpole", ["learner.batch=16", "learner.ranks=3"])
    text = str(caught.value)
    assert "learner.batch (16) must be divisible by learner.ranks (3)" in text
    assert "set learner.batch to 15 or 18, or learner.ranks to one of 1, 2, 4, 8, 16" in text
    with pytest.raises(ConfigError, match=r"set learner.batch to 4, or learner.ranks to one of 1, 2"):
        compose("cartpole", ["learner.batch=2", "learner.ranks=4"])


def test_one_card_for_several_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"set learner.device=cuda: rank k then takes card k"):
        compose("cartpole", ["learner.device=cuda:1", "learner.ranks=2"])


def test_torchrun_starts_ranks_beside_plain_processes_only():
    with pytest.raises(ConfigError, match=r"learner.launch=torchrun works with backend=local"):
        compose("cartpole", ["learner.launch=torchrun"])
    compose("cartpole", ["learner.launch=torchrun"], {"backend": "local"})
