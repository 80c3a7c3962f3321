"""A dataset comes in, a learner trains from it without a single actor, and its replay goes out again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.envs.toy import counter_row, episode_length
from bench.drill import Outcome
from deploy.run_dir import RunDirectory
from replay.datasets.npz import write_arrays

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
UPDATES = 12


def write_episodes(directory: Path, episodes: int) -> int:
    """Episodes of toy:counter as bare npz files, as another program might have written them."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    total = 0
    for episode in range(episodes):
        last = int(episode_length(3, np.zeros(1, np.int64), np.full(1, episode), 3, 12)[0])
        steps = np.arange(last + 1)
        fixed = np.zeros_like(steps)
        rows = counter_row(3, fixed, fixed + episode, steps, side=8)
        action = rng.integers(0, 3, len(steps)).astype(np.int32)
        action[0], action[-1] = 2, 0  # all three classes occur
        write_arrays(directory / f"{episode:05d}.npz", {**rows, "action": action})
        total += len(steps)
    return total


def result(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.mark.drill
def test_training_needs_no_actors_when_it_has_a_dataset(
    dreamfleet: Callable[..., Outcome], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_episodes(tmp_path / "toy", 60)
    imported = result(dreamfleet("replay", "import", "toy", "--to", "datasets", "--json"))
    assert imported["rows"] == rows
    offline = recipe(
        "offline",
        updates=UPDATES,
        actors={"count": 0},
        replay={"own_weight": 0, "sources": {"toy": {"path": "datasets/toy"}}},
    )
    summary = result(dreamfleet("train", offline, "--backend", "local", "--json"))
    assert summary["updates"] == UPDATES
    assert summary["env_steps"] == 0
    run = RunDirectory(tmp_path / "runs" / "offline")
    assert not list(run.replay.glob("shard-*"))
    assert {record["role"] for record in run.role_records()} == {"params", "learner"}
    # It goes on where it stopped, with a larger budget.
    more = result(
        dreamfleet("train", offline, "--backend", "local", "--json", "--set", f"updates={UPDATES + 5}")
    )
    assert more["updates"] == UPDATES + 5

    exported = result(
        dreamfleet("replay", "export", "datasets/toy", "--format", "zarr", "--to", "flat", "--json")
    )
    assert exported["rows"] == rows


def test_offline_settings_that_cannot_work_are_refused_before_anything_starts(
    dreamfleet: Callable[..., Outcome], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe("bad", actors={"count": 0}, replay={"own_weight": 0, "sources": {"x": {"path": "nowhere"}}})
    endless = dreamfleet("train", path, "--backend", "local")
    assert endless.code == 2
    assert "updates" in endless.err
    missing = dreamfleet("train", path, "--backend", "local", "--set", "updates=5")
    assert missing.code == 2
    assert "source x" in missing.err
    assert not (tmp_path / "runs").exists()
