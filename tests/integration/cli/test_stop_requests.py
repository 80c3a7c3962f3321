"""SIGTERM and Ctrl-C: exit code 75, a checkpoint, no process left, and the same command goes on."""

import os
import signal
from pathlib import Path

import pytest

from bench.drill import SHORT, Drill
from deploy.audit import audit_run
from learner.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENDLESS = SHORT | {"env_steps": 1_000_000, "learner": SHORT["learner"] | {"checkpoint_seconds": 600}}


@pytest.mark.drill
def test_interrupted_run_saves_and_resumes_even_from_the_older_checkpoint(tmp_path: Path) -> None:
    with Drill(tmp_path, ENDLESS) as run:
        store = CheckpointStore(run.run_dir.checkpoints, keep=3)
        run.start()
        run.wait_for("updates", lambda: run.updates > 10)
        run.interrupt()  # Ctrl-C reaches supervisor and roles alike
        assert run.wait() == 75, run.tail()
        assert run.processes() == []
        assert "the same command resumes" in run.output.read_text()
        saved = store.newest()
        assert saved is not None
        assert saved.step > 10  # no interval was over: the request itself made this checkpoint

        os.truncate(saved.path / "arrays.safetensors", 100)
        run.start()
        # The first thing a learner does is to save what it resumed from.
        run.wait_for("the next checkpoint", lambda: len(store.paths()) == 3)
        older, _, resumed = (int(path.name.split("-")[1]) for path in store.paths())
        assert resumed == older < saved.step
        run.wait_for_progress()
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.tail()
        audit = audit_run(run.run_dir.path)
        assert audit.balanced, audit.text()


def test_run_stopped_before_its_roles_work_is_resumable(tmp_path: Path) -> None:
    with Drill(tmp_path, SHORT) as run:
        run.start()
        run.wait_for("the first role", lambda: run.record("params-0") != {})
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.tail()
        assert run.processes() == []
        assert "Traceback" not in run.output.read_text()
        run.start()
        run.wait_for("rows", lambda: run.inserted > 0)


def test_second_request_ends_the_command_at_once(tmp_path: Path) -> None:
    with Drill(tmp_path, ENDLESS) as run:
        run.start()
        run.wait_for("roles at work", lambda: run.inserted > 0)
        run.signal(signal.SIGTERM)
        run.signal(signal.SIGTERM)
        assert run.wait(40) == 75, run.tail()
        assert run.processes() == []
        assert "Traceback" not in run.output.read_text()
