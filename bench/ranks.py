"""Kills and stops learner ranks of a real run and measures the time until noticed and until training again.

`python -m bench ranks` tries every fault a few times on the local backend, writes docs/results/ranks.json and
the table in docs/reliability.md. A stopped process (SIGSTOP) stands for all that hangs or is cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.chaos import RELIABILITY, Before
from bench.drill import TOY, Drill
from bench.load import Load, Row
from bench.report import RESULTS, between

RANKS = 2
CHECKPOINT_SECONDS = 5.0
RECIPE = TOY | {
    "max_restarts": 1000,
    "learner": TOY["learner"] | {"ranks": RANKS, "checkpoint_seconds": CHECKPOINT_SECONDS},
}
FAULTS: dict[str, tuple[int, signal.Signals]] = {
    "rank 1 killed": (1, signal.SIGKILL),
    "rank 0 killed": (0, signal.SIGKILL),
    "rank 1 stopped": (1, signal.SIGSTOP),
    "rank 0 stopped": (0, signal.SIGSTOP),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One rank lost. Made by `try_fault`."""

    detected_seconds: float  # from the signal until the driver says whose fault it is
    recovery_seconds: float  # from the signal until the first update that the dead had not done
    updates_repeated: int
    blamed: str  # role and reason as the event log has it
    foreign_load: float  # CPU cores that others used meanwhile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=3, help="times each fault is tried")
    parser.add_argument("--seconds", type=float, default=900.0, help="no kind of fault begins after this")
    parser.add_argument("--results", type=Path, default=RESULTS / "ranks.json", help="where the figures go")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per fault and figure."""
    begun = time.monotonic()
    trials: dict[str, list[Trial]] = {fault: [] for fault in FAULTS}
    for fault, found in trials.items():
        if time.monotonic() - begun < options.seconds:
            found += try_often(fault, options.trials)
    write_results(options.results, trials)
    for fault, found in trials.items():
        if found:
            yield from _rows(fault, found)


def try_often(fault: str, trials: int) -> list[Trial]:
    """In a run of its own: the driver waits longer before each restart within ten minutes."""
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder, Drill(Path(folder), RECIPE) as run:
        run.start()
        run.wait_for("both sides move", lambda: run.inserted > 0 and run.updates > 0)
        return [try_fault(run, fault) for _ in range(trials)]


def try_fault(run: Drill, fault: str) -> Trial:
    """Break a rank of a run that works, and wait until all work again."""
    run.wait_for_progress(rows=20, updates=5)
    run.wait_for("all ranks", lambda: all(run.running(f"learner-{rank}") for rank in range(RANKS)))
    before = Before(run)
    rank, number = FAULTS[fault]
    with Load() as load:
        begun, at = time.monotonic(), time.time()
        os.kill(int(run.record(f"learner-{rank}")["pid"]), number)
        run.wait_for(f"word of {fault}", lambda: bool(losses(run, at)))
        run.wait_for(f"training after {fault}", before.recovery("learner"))
        seconds = time.monotonic() - begun
    event = losses(run, at)[0]
    return Trial(
        detected_seconds=event["time"] - at,
        recovery_seconds=seconds,
        updates_repeated=before.repeated,
        blamed=f"{event['role']}: {event['reason']}".splitlines()[0],
        foreign_load=load.foreign,
    )


def losses(run: Drill, since: float) -> list[dict[str, Any]]:
    return [e for e in run.run_dir.events() if e["event"] == "role lost" and e["time"] >= since]


def _rows(fault: str, found: Sequence[Trial]) -> Iterator[Row]:
    for metric, unit in (
        ("detected_seconds", "s"), ("recovery_seconds", "s"), ("updates_repeated", "updates"),
    ):  # fmt: skip
        values = [float(getattr(trial, metric)) for trial in found]
        middle = statistics.median(values)
        low, _, high = statistics.quantiles(values * 2, n=4, method="inclusive")
        yield Row(
            bench="ranks", case=fault, metric=metric, value=middle, unit=unit, n=len(values),
            spread=(high - low) / middle if middle else 0.0,
            foreign_load=statistics.median(trial.foreign_load for trial in found),
        )  # fmt: skip


def write_results(path: Path, trials: dict[str, list[Trial]]) -> None:
    """Keep the figures and renew the table made of them."""
    data: dict[str, Any] = {
        "command": "python -m bench ranks",
        "ranks": RANKS,
        "checkpoint_seconds": CHECKPOINT_SECONDS,
        "faults": {fault: [asdict(trial) for trial in found] for fault, found in trials.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    if path == RESULTS / "ranks.json":
        RELIABILITY.write_text(between(RELIABILITY.read_text(), "ranks", table(data)))


def table(data: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = [
        f"`{data['command']}`: {data['ranks']} learner ranks on the CPU, `learner.rank_timeout` 5 s, a "
        f"checkpoint every {data['checkpoint_seconds']:g} s.",
        "Detected is the time until the driver says which rank is lost; training again is the time until the",
        "first update beyond the checkpoint that all ranks resumed from, as the status files say it (they",
        "are up to half a second old). Most of it is the start of new processes, and the driver's patience:",
        "0.2 s before the first restart, twice as much before each further one within ten minutes.",
        "",
        "| fault | trials | detected s, median | worst | training again s, median | worst | "
        "updates repeated, worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault, found in ((fault, found) for fault, found in data["faults"].items() if found):
        detected = [trial["detected_seconds"] for trial in found]
        seconds = [trial["recovery_seconds"] for trial in found]
        repeated = max(trial["updates_repeated"] for trial in found)
        lines.append(
            f"| {fault} | {len(found)} | {statistics.median(detected):.1f} | {max(detected):.1f} | "
            f"{statistics.median(seconds):.1f} | {max(seconds):.1f} | {repeated} |"
        )
    loads = [trial["foreign_load"] for found in data["faults"].values() for trial in found]
    lines += ["", f"Other processes used {statistics.median(loads):.1f} CPU cores meanwhile (median)."]
    return "\n".join(lines) + "\n"
