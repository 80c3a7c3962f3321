"""Runs the command line as a person does: in a process of its own, from a folder of its own."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import drill
from bench.drill import SHORT, Drill, Outcome


@pytest.fixture
def dreamfleet(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `dreamfleet ARGUMENTS` in tmp_path."""
    return partial(drill.dreamfleet, tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe into tmp_path, whose runs lie in tmp_path/runs."""

    def write(name: str = "short", **sections: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(SHORT | {"name": name} | sections))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with several checkpoints, finished. Tests copy it before they break it."""
    with Drill(tmp_path_factory.mktemp("finished"), SHORT, name="short") as run:
        assert run.start().wait() == 0, run.tail()
        return run.run_dir.path
