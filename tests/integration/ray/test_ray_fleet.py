"""Roles as Ray actors: start, speak, fail, die, stop; and nothing outlives its driver."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from deploy.fleet import RoleStatus
from deploy.ray_fleet import RayFleet
from deploy.roles import RoleSpec
from deploy.run_dir import RunDirectory, read_json
from system.errors import InfrastructureError

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KEY = "params-0"


@pytest.fixture(scope="module")
def fleet(run_dir: RunDirectory, leaves_nothing: None) -> Iterator[RayFleet]:
    fleet = RayFleet(run_dir.path)
    yield fleet
    fleet.close()


@pytest.fixture(autouse=True)
def stopped(fleet: RayFleet) -> Iterator[None]:
    yield
    if KEY in fleet.statuses():
        fleet.stop(KEY, 10.0)


def until(fleet: RayFleet, state: str, seconds: float = 30.0) -> RoleStatus:
    deadline = time.monotonic() + seconds
    while (status := fleet.statuses()[KEY]).state != state:
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    return status


def test_a_role_starts_reports_and_stops(
    fleet: RayFleet, spec: Callable[..., RoleSpec], run_dir: RunDirectory
):
    fleet.launch(spec("params"))
    status = until(fleet, "running")
    assert status.address.startswith("127.0.0.1:")
    assert status.metrics_port > 0
    assert psutil.pid_exists(status.pid)
    assert "parameter server listens" in (run_dir.logs / f"{KEY}.log").read_text()
    stopped = fleet.stop(KEY, 10.0)
    assert (stopped.state, stopped.exit_code) == ("stopped", 0)
    assert not psutil.pid_exists(status.pid)
    assert read_json(run_dir.status / f"{KEY}.json")["state"] == "stopped"


def test_age_grows_while_the_role_says_nothing(fleet: RayFleet, spec: Callable[..., RoleSpec]):
    fleet.launch(spec("params", 2))
    pid = until(fleet, "running").pid
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while fleet.statuses()[KEY].age < 1.5:  # twice what a slice and a late answer take together
        assert time.monotonic() < deadline
    begun = time.monotonic()
    status = fleet.stop(KEY, 0.5)  # it cannot answer: killed
    assert status.state == "failed"
    assert "killed" in status.error
    assert time.monotonic() - begun < 30
    assert not psutil.pid_exists(pid)


def test_a_failure_comes_back_with_its_reason(fleet: RayFleet, spec: Callable[..., RoleSpec]):
    fleet.launch(spec("actor", params_address="127.0.0.1:1", shard_addresses=("127.0.0.1:1",)))
    deadline = time.monotonic() + 30
    while (status := fleet.statuses()["actor-0"]).state != "failed":
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    assert "KeyError" in status.error
    assert "from_json" in status.error
    assert status.exit_code == 1
    assert fleet.stop("actor-0", 5.0).error == status.error


def test_a_port_in_use_is_a_preflight_failure(fleet: RayFleet, spec: Callable[..., RoleSpec]):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        fleet.launch(spec("params", 3, port=taken.getsockname()[1]))
        status = until(fleet, "failed")
    assert status.exit_code == 3
    assert "port" in status.error


def test_a_killed_role_is_seen_and_can_be_launched_again(fleet: RayFleet, spec: Callable[..., RoleSpec]):
    fleet.launch(spec("params", 4))
    first = until(fleet, "running")
    with pytest.raises(InfrastructureError, match="still runs"):
        fleet.launch(spec("params", 5))
    os.kill(first.pid, signal.SIGKILL)
    lost = until(fleet, "failed")
    assert lost.address == first.address
    assert "died" in lost.error
    fleet.launch(spec("params", 5, port=int(first.address.rsplit(":")[-1])))
    again = until(fleet, "running")
    assert again.pid != first.pid
    assert again.address == first.address
    assert fleet.statuses()[KEY].age < 5


DRIVER = """
import pathlib, sys, time
from deploy.ray_local import prepare_ray
prepare_ray()
from deploy.ray_fleet import RayFleet
from deploy.roles import RoleSpec
fleet = RayFleet(pathlib.Path(sys.argv[1]))
fleet.launch(RoleSpec.from_json(sys.argv[2]))
while fleet.statuses()["params-0"].state != "running":
    time.sleep(0.05)
print(fleet._local._directory, flush=True)
time.sleep(600)
"""


def test_kill_9_of_the_driver_leaves_neither_process_nor_file(
    spec: Callable[..., RoleSpec], run_dir: RunDirectory, environment: dict[str, str]
):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run_dir.path), spec("params", 9).to_json()],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert driver.stdout is not None
    directory = driver.stdout.readline().strip()
    assert directory, "the driver did not start"
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) > 5
    driver.kill()
    driver.wait()
    driver.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    deadline = time.monotonic() + 10
    while os.path.exists(directory):  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.05)
