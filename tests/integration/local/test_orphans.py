"""No role outlives its driver, whenever that dies; what does is ended before the run goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.drill import PATIENCE_SECONDS, POLL_SECONDS, SHORT, environment
from deploy.local import end_leftovers, leftovers
from deploy.roles import RoleSpec
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run").create()
    run.release()
    return run


Launch = Callable[[int], subprocess.Popen[bytes]]


@pytest.fixture
def launch(run_dir: RunDirectory) -> Iterator[Launch]:
    """Starts a parameter server as `LocalFleet` does, told which process is its driver."""
    config = RunConfig.model_validate(SHORT | {"backend": "local"}).model_dump(mode="json")
    spec = RoleSpec(
        role="params", index=0, incarnation=1, run_dir=str(run_dir.path), config=config, env_spec={}
    )
    made: list[subprocess.Popen[bytes]] = []

    def start(driver: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.role_process", str(driver)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
        made.append(process)
        assert process.stdin is not None
        process.stdin.write(spec.to_json().encode())
        process.stdin.close()
        return process

    yield start
    for process in made:
        process.kill()
        process.wait()


def wait_until_running(run_dir: RunDirectory) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "running" not in {record["state"] for record in run_dir.role_records()}:
        assert time.monotonic() < deadline
        time.sleep(POLL_SECONDS)


def test_role_whose_driver_died_while_it_started_ends(launch: Launch) -> None:
    orphan = launch(os.getppid())  # alive, but not the parent of the role: as if the driver were gone
    assert orphan.wait(PATIENCE_SECONDS) is not None


def test_leftover_is_found_and_ended(launch: Launch, run_dir: RunDirectory) -> None:
    role = launch(os.getpid())
    wait_until_running(run_dir)
    assert [process.pid for process in leftovers(run_dir.path)] == [role.pid]
    end_leftovers(run_dir.path)
    assert role.poll() is not None
    assert leftovers(run_dir.path) == []


def test_stranger_with_the_number_of_an_old_role_is_left_alone(run_dir: RunDirectory) -> None:
    record = {"role": "params", "index": 0, "incarnation": 1, "state": "running", "time": time.time()}
    run_dir.write_json(run_dir.status / "params-0.json", record | {"pid": os.getpid()})
    run_dir.write_json(run_dir.status / "shard-0.json", record | {"pid": 2**22 + 1})
    (run_dir.status / "learner-0.json").write_text("{")
    assert leftovers(run_dir.path) == []
    end_leftovers(run_dir.path)
