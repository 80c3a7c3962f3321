"""A run from the command to its summary, killed as a whole on the way and finished by the same command."""

import json
from pathlib import Path

import pytest

from bench.drill import TOY, Drill
from deploy.audit import audit_run
from deploy.evaluate import evaluate_run
from deploy.run_dir import json_lines
from deploy.status import run_status
from deploy.world_model import evaluate_world_model
from learner.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 1600


def test_run_killed_as_a_whole_is_finished_by_the_same_command(tmp_path: Path) -> None:
    recipe = TOY | {"env_steps": STEPS, "learner": TOY["learner"] | {"checkpoint_seconds": 1}}
    with Drill(tmp_path, recipe) as run:
        store = CheckpointStore(run.run_dir.checkpoints, keep=3)
        run.start()
        run.wait_for("half of the rows", lambda: run.inserted > STEPS / 4 and bool(store.paths()))
        run.wait_for("a checkpoint after updates", lambda: int(store.paths()[-1].name.split("-")[1]) > 5)
        run.kill_everything()
        saved = store.newest()
        killed = audit_run(run.run_dir.path)

        run.start()
        assert run.wait() == 0, run.tail()
        assert run.processes() == []

        audit = audit_run(run.run_dir.path)
        assert audit.balanced, audit.text()
        summary = json.loads(run.run_dir.summary_file.read_text())
        final = store.newest()
        assert saved is not None
        assert final is not None
        assert STEPS <= summary["env_steps"] == audit.inserted
        assert audit.inserted > killed.inserted > 0  # the replay was kept
        assert summary["updates"] == final.step > saved.step
        assert final.state["progress"]["rows_trained"] == 4 * 8 * final.step
        assert final.state["publisher"]["epoch"] > saved.state["publisher"]["epoch"]
        held = final.state["reader"]["limiter"]
        assert held["trained"] == final.state["progress"]["rows_trained"]
        owed = 4 * (held["inserted"] - held["prefill_rows"]) - held["trained"]
        assert abs(owed) <= 4 * run_tolerance(run)  # nothing was trained twice or forgotten over the kill
        for name in ("curve.png", "openloop-image.gif", "run.yaml", "targets.json"):
            assert (run.run_dir.path / name).stat().st_size > 0
        assert "evaluation return" in run.output.read_text()
        assert len(list(json_lines(run.run_dir.metrics / "episodes.jsonl"))) > 50
        # A warmup of 100 updates in a run of 190 is an alarm, and the only one of a sound run.
        assert [alarm["alarm"] for alarm in summary["alarms"]] == ["learning_rate"]
        assert [alarm.alarm for alarm in run_status(run.run_dir.path).alarms] == ["learning_rate"]
        assert " learning_rate since update " in run.output.read_text()
        again = evaluate_run(run.run_dir.path, 2)
        assert again.mean == summary["evaluation_return"]
        assert again.env_steps == held["inserted"]
        judged = evaluate_world_model(run.run_dir.path, horizon=10)
        assert judged.report.sound, judged.text()
        assert (judged.updates, judged.reference) == (final.step, None)
        assert all(file.stat().st_size > 0 for file in judged.files)


def run_tolerance(run: Drill) -> int:
    from deploy.run_config import RunConfig

    return RunConfig.model_validate(run.run_dir.config()).tolerance
