"""Whole runs and their health: a sound one raises nothing, one that cannot learn says why."""

from pathlib import Path
from typing import Any

import pytest

from bench.drill import Drill
from deploy.health import AlarmHistory, alarm_histories
from deploy.run_config import RECIPES
from deploy.run_dir import read_json
from system.config import read_yaml

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(1200)]


def finished(root: Path, env_steps: int, **learner: Any) -> dict[str, AlarmHistory]:
    """Alarms of a CartPole run of that length, as its summary has them."""
    recipe: dict[str, Any] = read_yaml(RECIPES / "cartpole.yaml")[0]
    recipe["learner"] |= learner
    with Drill(root, recipe | {"env_steps": env_steps, "evaluation": {"episodes": 2, "envs": 2}}) as run:
        run.start()
        assert run.wait() == 0, run.tail()
        histories = alarm_histories(run.run_dir)
        assert read_json(run.run_dir.summary_file)["alarms"] == [history.to_dict() for history in histories]
        return {history.alarm: history for history in histories}


def test_sound_run_raises_no_alarm(tmp_path: Path) -> None:
    assert finished(tmp_path, 6000) == {}


def test_learning_rate_that_ruins_a_run_is_told_in_its_summary(tmp_path: Path) -> None:
    settings = {"size": "nano", "lr": 1000.0, "warmup": 0}
    alarms = finished(tmp_path, 3000, settings=settings, health={"quiet_updates": 20, "patience": 20})
    assert {"gradient_explosion", "kl_explosion"} & alarms.keys()
    assert all("learner.settings.lr" in alarms[name].remedy for name in alarms.keys() & {"kl_explosion"})
