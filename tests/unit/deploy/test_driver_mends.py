"""What the driver counts and relaunches when roles die, on a fleet whose words the test decides."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.driver import Driver
from deploy.fleet import RoleStatus
from deploy.roles import RoleSpec
from deploy.run_config import compose
from deploy.run_dir import RunDirectory
from system.specs import ActionSpec, EnvSpec

ENV = EnvSpec(name="toy:x", obs={}, action=ActionSpec(kind="discrete", classes=(2,)))


class ScriptedFleet:
    """A Fleet in memory: roles run from launch on and say what the test puts into `words`."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.words: dict[str, RoleStatus] = {}

    def launch(self, spec: RoleSpec) -> None:
        self.launched.append(spec.key)
        self.words[spec.key] = RoleStatus(state="running", age=0.0, address="127.0.0.1:1")

    def statuses(self) -> dict[str, RoleStatus]:
        return dict(self.words)

    def stop(self, key: str, timeout: float) -> RoleStatus:
        return self.words[key]

    def kill(self, key: str) -> None:
        return None

    def close(self) -> None:
        return None


@pytest.fixture
def fleet() -> ScriptedFleet:
    return ScriptedFleet()


@pytest.fixture
def driver(fleet: ScriptedFleet, tmp_path: Path) -> Iterator[Driver]:
    config, _ = compose("cartpole", ["actors.count=1", "replay.shards=1"], {"root": str(tmp_path)})
    run_dir = RunDirectory(tmp_path / "run").create()
    driver = Driver(config, ENV, fleet, run_dir)
    driver.start()
    yield driver
    run_dir.release()


def killed(episodes: int) -> RoleStatus:
    newest = [{"score": 1.0, "length": 9}] * episodes
    payload = {"episodes_total": episodes, "episodes": newest, "acknowledged": 90}
    return RoleStatus(state="failed", age=0.0, payload=payload, error="ended by signal SIGKILL")


def fall_due(driver: Driver) -> None:
    """Let pending relaunches be due now: no sleeping in tests."""
    for key in driver._relaunch_at:
        driver._relaunch_at[key] = 0.0


def test_episodes_of_a_killed_actor_are_counted_once(driver: Driver, fleet: ScriptedFleet) -> None:
    fleet.words["actor-0"] = killed(episodes=7)
    driver.step(0.0)
    fall_due(driver)
    driver.step(0.0)  # relaunches
    driver.step(0.0)
    assert fleet.launched.count("actor-0") == 2
    assert driver.episodes == 7
    assert len(driver.curve) == 7


def test_actor_lost_just_before_collection_ends_stays_away(driver: Driver, fleet: ScriptedFleet) -> None:
    fleet.words["actor-0"] = killed(episodes=1)
    driver.step(0.0)
    inserted = {"inserted": driver.config.env_steps}
    fleet.words["shard-0"] = RoleStatus(state="running", age=0.0, address="127.0.0.1:1", payload=inserted)
    driver.step(0.0)
    assert not driver.finished  # the learner has said nothing of what it owes; collection has ended
    fall_due(driver)
    driver.step(0.0)
    assert fleet.launched.count("actor-0") == 1
