"""Small runs and an eye on what they leave behind."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.roles import RoleSpec
from deploy.run_config import RunConfig, compose
from deploy.run_dir import RunDirectory

SMALL = (
    "env.name=envpool:CartPole-v1",
    "env_steps=100000",
    "actors.count=1",
    "actors.envs=2",
    "actors.chunk_rows=8",
    "replay.shards=1",
    "replay.capacity=20000",
    "replay.prefill=64",
    "replay.train_ratio=2",
    "learner.batch=4",
    "learner.length=16",
    "learner.device=cpu",
    "evaluation.episodes=4",
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Assignments over the cartpole recipe: minutes of CPU become seconds."""
    return SMALL


def ray_processes() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(scope="module")
def leaves_nothing() -> Iterator[None]:
    """Fails when a process started meanwhile is still there at the end."""
    before = ray_processes()
    yield
    _, alive = psutil.wait_procs(list(ray_processes() - before), timeout=20)
    assert not alive, [p.cmdline() for p in alive]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = RunDirectory(tmp_path_factory.mktemp("run")).create()
    made.release()
    return made


@pytest.fixture(scope="module")
def config(run_dir: RunDirectory) -> RunConfig:
    return compose("cartpole", [*SMALL, f"root={run_dir.path.parent}"])[0]


@pytest.fixture
def spec(run_dir: RunDirectory, config: RunConfig) -> Callable[..., RoleSpec]:
    def make(role: str, incarnation: int = 1, **changes: object) -> RoleSpec:
        values = {"config": config.model_dump(mode="json"), "env_spec": {}, **changes}
        return RoleSpec(role=role, index=0, incarnation=incarnation, run_dir=str(run_dir.path), **values)

    return make


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For child Pythons: they find the checkout whatever their directory."""
    root = str(Path(__file__).resolve().parents[3])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
