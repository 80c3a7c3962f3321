"""What each room loads. A fresh interpreter imports every module of the room and lists what came along."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("ray", "torch", "zarr", "gymnasium", "envpool")

IMPORT_ALL = """
import importlib, json, pkgutil, sys
room = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(room.__path__, room.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(json.dumps([len(names), sorted({name.split(".")[0] for name in sys.modules})]))
"""
IMPORT_ONE = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps([1, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def loaded_by(root: Path, code: str, name: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    count, modules = json.loads(done.stdout.splitlines()[-1])
    assert count > 0
    return set(modules)


@pytest.mark.parametrize(
    ("room", "unwanted"),
    [
        ("system", {*HEAVY}),
        ("replay", {"ray", "torch", "gymnasium", "envpool"}),
        ("actors", {"ray", "torch"}),
        ("learner", {"ray", "gymnasium", "envpool"}),
    ],
)
def test_room_loads_only_what_it_owns(root: Path, room: str, unwanted: set[str]) -> None:
    assert not unwanted & loaded_by(root, IMPORT_ALL, room)


def test_command_line_starts_without_heavy_imports(root: Path) -> None:
    assert not set(HEAVY) & loaded_by(root, IMPORT_ONE, "deploy.__main__")


@pytest.mark.parametrize("module", ["actors.loop", "actors.actor", "actors.evaluator"])
def test_environment_loop_knows_no_environment_library(root: Path, module: str) -> None:
    assert not {"gymnasium", "envpool", "torch", "ray"} & loaded_by(root, IMPORT_ONE, module)


def test_run_config_is_importable_without_heavy_imports(root: Path) -> None:
    assert not set(HEAVY) & loaded_by(root, IMPORT_ONE, "deploy.run_config")


@pytest.mark.parametrize(
    "module", ["learner.health.monitor", "learner.health.nonfinite", "learner.health.settings"]
)
def test_health_monitor_judges_plain_numbers(root: Path, module: str) -> None:
    assert not set(HEAVY) & loaded_by(root, IMPORT_ONE, module)
