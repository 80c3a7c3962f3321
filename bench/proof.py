"""`make proof`: learning on real environments through the whole loop, with seeds, spread and random baseline.

Each case is a list of `dreamfleet train` commands in fresh run directories; results go to
docs/results/<case>.json and from there, generated, into docs/performance.md. `worldmodel` is a case of its
own: the world model of CartPole against the true one (`bench.world_model`), without a fleet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import RESULTS, rewrite
from deploy.run_dir import json_lines

DREAMFLEET = [sys.executable, "-m", "deploy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One claim and the runs that prove it."""

    recipe: str
    seeds: tuple[int, ...]
    bar: str  # in words, for the table
    assignments: tuple[str, ...] = ()
    least_return: float | None = None  # every seed must reach it
    least_training: float | None = None  # mean training return of the last TRAINING_STEPS
    falling_loss: str | None = None  # this loss must end below half of where it began
    keep: tuple[str, ...] = field(default=())  # files copied into docs/results


CASES: dict[str, Case] = {
    "cartpole": Case(
        recipe="cartpole", seeds=(0, 1, 2, 3, 4), bar="mean >= 400 of 20 episodes", least_return=400.0
    ),
    "minigrid": Case(recipe="minigrid", seeds=(0, 1, 2), bar=">= 0.9", least_return=0.9),
    "pendulum": Case(recipe="pendulum", seeds=(0, 1, 2), bar=">= 50, ten times random", least_return=50.0),
    "pong_pixels": Case(
        recipe="pong_pixels", seeds=(0,), bar="falling reconstruction loss, video",
        falling_loss="loss/obs/image",
        keep=("openloop-image.mp4",),
    ),
}  # fmt: skip
TRAINING_STEPS = 20_000
"""Steps before the end that a training return is averaged over, as the official ones of
docs/results/reference-dmc.json are: while returns grow, a shorter window reads higher."""
DMC_GATES = {"cartpole_balance": 434.0, "cartpole_swingup": 272.0, "walker_stand": 288.0}
"""Training returns at 50,000 steps: means of the official curves over 5 seeds minus one standard deviation
(docs/gpu_checks.md). They want a GPU: an update per step."""
CASES |= {
    f"dmc_{task}": Case(
        recipe="dmc_proprio", seeds=(0, 1, 2), bar=f"training return >= {least:g} at 50k steps",
        assignments=(f"env.name=dmc:{task}", "env_steps=50000", "backend=local"), least_training=least,
    )
    for task, least in DMC_GATES.items()
}  # fmt: skip

WORLD_MODEL = "worldmodel"


def _loss_ends(run_dir: Path, key: str) -> tuple[float, float]:
    """Mean of a metric over the first and the last tenth of its records."""
    lines = (run_dir / "metrics" / "metrics.jsonl").read_text().splitlines()
    values = [r[f"learner/{key}"] for r in map(json.loads, lines) if f"learner/{key}" in r]
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def training_return(run_dir: Path, env_steps: int) -> float | None:
    """Mean return of the training episodes that ended in the last TRAINING_STEPS; None without any.

    Like the official curves these are returns of the sampling policy; the evaluation is greedy.
    """
    points = json_lines(run_dir / "metrics" / "episodes.jsonl")
    newest = [point["return"] for point in points if point["env_steps"] > env_steps - TRAINING_STEPS]
    return statistics.fmean(newest) if newest else None


def run_one(name: str, case: Case, seed: int, root: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Train once in a fresh directory and return what happened."""
    sets = [f"seed={seed}", f"root={root}", f"name={name}-{seed}", *case.assignments, *extra]
    command = [*DREAMFLEET, "train", case.recipe, "--json", *(part for s in sets for part in ("--set", s))]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    wall = time.perf_counter() - began
    if done.returncode:
        return {"seed": seed, "passed": False, "exit_code": done.returncode, "wall_seconds": wall}
    summary = json.loads(done.stdout.splitlines()[-1])
    run_dir = Path(summary["run_dir"])
    row: dict[str, Any] = {
        "seed": seed, "wall_seconds": wall, "env_steps": summary["env_steps"], "updates": summary["updates"],
        "return": summary["evaluation_return"], "std": summary["evaluation_std"],
        "episodes": summary["evaluation_episodes"], "random": summary["random_return"],
    }  # fmt: skip
    passed = case.least_return is None or row["return"] >= case.least_return
    if case.least_training is not None:
        row["training_return"] = training_return(run_dir, summary["env_steps"])
        passed = row["training_return"] is not None and row["training_return"] >= case.least_training
    if case.falling_loss:
        row["loss_first"], row["loss_last"] = _loss_ends(run_dir, case.falling_loss)
        passed = passed and row["loss_last"] < 0.5 * row["loss_first"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for file in case.keep:
        shutil.copy(run_dir / file, RESULTS / f"{name}-{seed}-{file}")
    return row | {"passed": bool(passed)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__)
    parser.add_argument(
        "cases",
        nargs="*",
        default=["minigrid", "pendulum", "pong_pixels"],
        help="of: " + ", ".join([*CASES, WORLD_MODEL]),
    )
    parser.add_argument("--seeds", help="comma-separated, instead of the case's own")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE")
    parser.add_argument("--keep-runs", type=Path, help="leave run directories here instead of deleting them")
    parser.add_argument("--note", default="", help="conditions to print under the table, such as other load")
    parser.add_argument("--no-report", action="store_true", help="print only, write no table")
    arguments = parser.parse_args(argv)
    failed = 0
    for name in arguments.cases:
        if name == WORLD_MODEL:
            from bench.world_model import prove

            failed += prove(["--seeds", arguments.seeds] if arguments.seeds else [])
            continue
        case = CASES[name]
        seeds = tuple(map(int, arguments.seeds.split(","))) if arguments.seeds else case.seeds
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="dreamfleet-proof-") as temporary:
            root = arguments.keep_runs or Path(temporary)
            for seed in seeds:
                rows.append(run_one(name, case, seed, root, arguments.assignments))
                print(json.dumps({"case": name, **rows[-1]}), flush=True)
        failed += sum(not row["passed"] for row in rows)
        if not arguments.no_report:
            overrides = "".join(f" --set {s}" for s in arguments.assignments)
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"proof-{name}.json").write_text(
                json.dumps(
                    {"case": name, "recipe": case.recipe, "bar": case.bar, "rows": rows,
                     "note": arguments.note,
                     "command": f"python -m bench.proof {name}{overrides}"}, indent=1,
                ) + "\n"
            )  # fmt: skip
            rewrite()
    print(json.dumps({"cases": arguments.cases, "failed_runs": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
