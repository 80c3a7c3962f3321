"""Whole runs whose learner has several ranks: ranks die, stop, come by torchrun, and change in number."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.drill import CHECKOUT, TOY, Drill, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DETECTED_SECONDS = 10.0


def recipe(**learner: Any) -> dict[str, Any]:
    """Checkpoints only as the loop begins and ends: what else there is was saved because a rank was lost."""
    return TOY | {"learner": TOY["learner"] | {"ranks": 2, "checkpoint_seconds": 600, **learner}}


def steps(run: Drill) -> list[int]:
    """Updates in the checkpoints, oldest first."""
    names = sorted(path.name for path in run.run_dir.checkpoints.iterdir() if path.name[0] != ".")
    return [int(name.split("-")[1]) for name in names]


def lose(run: Drill, key: str, number: signal.Signals) -> dict[str, Any]:
    """Break a rank, wait until all train again; return the event that names it and when it came."""
    run.wait_for("ranks to lose", lambda: run.running("learner-0") and run.running("learner-1"))
    lives, begun = run.incarnation("learner-0"), time.time()
    os.kill(int(run.record(key)["pid"]), number)

    def events() -> list[dict[str, Any]]:
        return [e for e in run.run_dir.events() if e["event"] == "role lost" and e["time"] >= begun]

    run.wait_for("word of the loss", lambda: bool(events()))
    run.wait_for("new lives", lambda: run.incarnation("learner-0") > lives)
    run.wait_for("updates by them", lambda: "rows_trained" in run.payload("learner-0"))
    run.wait_for_progress()
    return {**events()[0], "after": events()[0]["time"] - begun}


def test_killed_rank_costs_no_update_and_all_ranks_train_on(tmp_path: Path) -> None:
    with Drill(tmp_path, recipe()) as run:
        run.start()
        run.wait_for("updates", lambda: run.updates > 5 and run.running("learner-1"))
        done = run.updates
        lost = lose(run, "learner-1", signal.SIGKILL)
        assert lost["role"] == "learner-1"
        assert "SIGKILL" in lost["reason"]
        assert lost["after"] < DETECTED_SECONDS
        saved = steps(run)
        assert saved[-1] >= done  # rank 0 saved before it ended, and went on from there
        assert run.payload("learner-1")["served"] > 0
        assert run.incarnation("learner-1") == run.incarnation("learner-0") == 2
        run.signal(signal.SIGTERM)
        assert run.wait() == 75
        assert [run.record(f"learner-{rank}")["state"] for rank in range(2)] == ["stopped", "stopped"]
        assert steps(run)[-1] >= run.updates > saved[-1]


@pytest.mark.drill
def test_stopped_ranks_are_noticed_in_seconds(tmp_path: Path) -> None:
    with Drill(tmp_path, recipe()) as run:
        run.start()
        run.wait_for("updates", lambda: run.updates > 5)
        for victim in (1, 0):
            lost = lose(run, f"learner-{victim}", signal.SIGSTOP)
            assert lost["role"] == f"learner-{1 - victim}"  # the other one tells
            assert f"learner rank {victim} is lost: it has said nothing for" in lost["reason"]
            assert lost["after"] < DETECTED_SECONDS


@pytest.mark.drill
def test_number_of_ranks_changes_at_resume(tmp_path: Path) -> None:
    done = 0
    for life, ranks in enumerate((1, 2, 1), 1):
        with Drill(tmp_path, recipe(ranks=ranks)) as run:
            run.start()
            run.wait_for("its life", lambda: run.incarnation("learner-0") == life)  # noqa: B023
            run.wait_for("updates of this life", lambda: "rows_trained" in run.payload("learner-0"))
            assert run.updates >= done
            assert run.running("learner-1") == (ranks == 2)
            run.wait_for_progress()
            run.signal(signal.SIGTERM)
            assert run.wait() == 75
            done = run.updates
            assert steps(run)[-1] == done


@contextmanager
def torchrun(run: Drill, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = ["--nproc-per-node", "2", "--max-restarts", "5", "-m", "deploy.torchrun", str(run.run_dir.path)]
    with out.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command], cwd=CHECKOUT, env=environment(),
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.drill
def test_ranks_started_by_torchrun_join_the_run_and_come_back(tmp_path: Path) -> None:
    with (
        Drill(tmp_path, recipe(launch="torchrun")) as run,
        torchrun(run, tmp_path / "torchrun.out") as launcher,
    ):
        run.start()
        run.wait_for("updates", lambda: run.updates > 5 and run.running("learner-1"))
        lost = lose(run, "learner-1", signal.SIGKILL)
        assert lost["after"] < DETECTED_SECONDS
        run.signal(signal.SIGTERM)
        assert run.wait() == 75
        assert launcher.wait(60) == 0
