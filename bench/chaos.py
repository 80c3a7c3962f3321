"""Kills parts of a real run and measures what that costs: seconds until they work again, rows, updates.

`python -m bench chaos` tries every fault a few times on the local backend, writes docs/results/chaos.json and
the table in docs/reliability.md. Rows are judged by `deploy.audit` after each fault, not by this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.drill import TOY, Drill
from bench.load import Load, Row
from bench.report import DOCS, RESULTS, between
from deploy.audit import Audit, audit_run
from system.errors import IntegrityError

CHECKPOINT_SECONDS = 5.0
RECIPE = TOY | {"learner": TOY["learner"] | {"checkpoint_seconds": CHECKPOINT_SECONDS}}
ACTORS = tuple(f"actor-{index}" for index in range(TOY["actors"]["count"]))
RELIABILITY = DOCS / "reliability.md"
EVERYTHING = "everything"
FAULTS: dict[str, tuple[str, ...]] = {
    "one actor": ACTORS[:1],
    "all actors": ACTORS,
    "replay shard": ("shard-0",),
    "parameter server": ("params-0",),
    "learner": ("learner-0",),
    EVERYTHING: (),
}
"""What is killed with SIGKILL. `everything` is supervisor and roles at once, then the same command again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fault. Made by `try_fault`."""

    recovery_seconds: float  # from the kill until what was killed works again
    acknowledged: int  # rows, by all lives of all actors of the run so far
    lost: int  # acknowledged rows that went with this fault
    doubled: int
    missing: int
    updates_repeated: int  # updates done when the learner died that its checkpoint did not have
    foreign_load: float  # CPU cores that others used meanwhile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=3, help="times each fault is tried")
    parser.add_argument("--seconds", type=float, default=600.0, help="no round of faults begins after this")
    parser.add_argument("--results", type=Path, default=RESULTS / "chaos.json", help="where the figures go")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per fault and figure. Raises: IntegrityError when the books of the run do not balance."""
    begun = time.monotonic()
    trials: dict[str, list[Trial]] = {fault: [] for fault in FAULTS}
    with tempfile.TemporaryDirectory(prefix="bench-chaos-") as folder, Drill(Path(folder), RECIPE) as run:
        run.start()
        run.wait_for("both sides move", lambda: run.inserted > 0 and run.updates > 0)
        for _ in range(options.trials):
            if time.monotonic() - begun > options.seconds:
                break
            for fault in FAULTS:
                trials[fault].append(try_fault(run, fault))
    write_results(options.results, trials)
    for fault, found in trials.items():
        yield from _rows(fault, found)


def try_fault(run: Drill, fault: str) -> Trial:
    """Break a run that works, wait until it works again, and audit it."""
    run.wait_for_progress(rows=100, updates=5)
    books = audited(run)
    before = Before(run)
    with Load() as load:
        begun = time.monotonic()
        if fault == EVERYTHING:
            run.kill_everything()
            run.start()
        else:
            run.kill(*FAULTS[fault])
        run.wait_for(f"recovery from the death of {fault}", before.recovery(fault))
        seconds = time.monotonic() - begun
    audit = audited(run)
    return Trial(
        recovery_seconds=seconds,
        acknowledged=audit.acknowledged,
        lost=audit.lost - books.lost,
        doubled=audit.doubled - books.doubled,
        missing=audit.missing - books.missing,
        updates_repeated=before.repeated,
        foreign_load=load.foreign,
    )


def audited(run: Drill) -> Audit:
    """Raises: IntegrityError when the books show anything but lost, doubled or missing rows."""
    audit = audit_run(run.run_dir.path)
    if {finding.kind for finding in audit.findings} - {"lost", "doubled", "missing"}:
        raise IntegrityError(f"the run's books do not balance; keep it and report this:\n{audit.text()}")
    return audit


class Before:
    """What a run had reached when it was broken, and how to tell that it works again."""

    def __init__(self, run: Drill) -> None:
        self._run = run
        records = {f"{r['role']}-{r['index']}": r for r in run.run_dir.role_records()}
        self._lives = {key: int(record["incarnation"]) for key, record in records.items()}
        self._payloads = {key: record["payload"] for key, record in records.items()}
        self._inserted, self._updates = run.inserted, run.updates
        self._serial = max(checkpoints(run), default=0)
        self._resumed_at: int | None = None

    @property
    def repeated(self) -> int:
        """Updates done again, as the learner reported them up to half a second before."""
        return 0 if self._resumed_at is None else max(0, self._updates - self._resumed_at)

    def recovery(self, fault: str) -> Callable[[], bool]:
        return {
            "one actor": lambda: self._actor_sends(ACTORS[0]),
            "all actors": lambda: all(map(self._actor_sends, ACTORS)),
            "replay shard": self._shard_stores,
            "parameter server": self._policies_get_newer,
            "learner": self._learner_trains,
            EVERYTHING: lambda: self._learner_trains() and self._run.inserted > self._inserted,
        }[fault]

    def _reborn(self, key: str) -> bool:
        return self._run.running(key) and self._run.incarnation(key) > self._lives[key]

    def _actor_sends(self, key: str) -> bool:
        return self._reborn(key) and self._run.payload(key).get("acknowledged", 0) > 0

    def _shard_stores(self) -> bool:
        stored = self._run.payload("shard-0").get("inserted", 0)
        return self._reborn("shard-0") and stored > self._payloads["shard-0"]["inserted"]

    def _policies_get_newer(self) -> bool:
        """Every actor has a version that was published after the fault."""
        version = self._payloads["learner-0"]["published"]
        newer = all(self._run.payload(key).get("policy_version", 0) > version for key in ACTORS)
        return self._reborn("params-0") and newer

    def _learner_trains(self) -> bool:
        if not self._reborn("learner-0"):
            return False
        if self._resumed_at is None:  # the first thing a new life does is to save what it loaded
            newer = {serial: step for serial, step in checkpoints(self._run).items() if serial > self._serial}
            self._resumed_at = newer[min(newer)] if newer else None
        return self._resumed_at is not None and self._run.updates > self._resumed_at


def checkpoints(run: Drill) -> dict[int, int]:
    """Updates by serial number of the checkpoints there are."""
    names = [path.name.split("-") for path in run.run_dir.checkpoints.iterdir() if path.name[0] != "."]
    return {int(serial): int(step) for serial, step in names}


def _rows(fault: str, found: Sequence[Trial]) -> Iterator[Row]:
    for metric, unit in (
        ("recovery_seconds", "s"), ("lost", "rows"), ("doubled", "rows"), ("updates_repeated", "updates"),
    ):  # fmt: skip
        values = [float(getattr(trial, metric)) for trial in found]
        middle = statistics.median(values)
        low, _, high = statistics.quantiles(values * 2, n=4, method="inclusive")
        yield Row(
            bench="chaos", case=fault, metric=metric, value=middle, unit=unit, n=len(values),
            spread=(high - low) / middle if middle else 0.0,
            foreign_load=statistics.median(trial.foreign_load for trial in found),
        )  # fmt: skip


def write_results(path: Path, trials: dict[str, list[Trial]]) -> None:
    """Keep the figures and renew the table made of them."""
    data: dict[str, Any] = {
        "command": "python -m bench chaos",
        "checkpoint_seconds": CHECKPOINT_SECONDS,
        "actors": len(ACTORS),
        "faults": {fault: [asdict(trial) for trial in found] for fault, found in trials.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    if path == RESULTS / "chaos.json":
        RELIABILITY.write_text(between(RELIABILITY.read_text(), "chaos", table(data)))


def table(data: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = [
        f"`{data['command']}`: {data['actors']} actors, a checkpoint every {data['checkpoint_seconds']:g} s. "
        "Recovery is the time from SIGKILL until what was killed",
        "works again, as the status files say it (they are up to half a second old): actors have rows "
        "acknowledged, the shard",
        "stores, actors have a newer policy, the learner trains. Rows are judged by `dreamfleet audit` after "
        "each fault.",
        "",
        "| killed | trials | recovery s, median | worst | rows acknowledged | lost | doubled | "
        "updates repeated, worst |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for fault, found in data["faults"].items():
        seconds = [trial["recovery_seconds"] for trial in found]
        lines.append(
            f"| {fault} | {len(found)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} | "
            f"{max(trial['acknowledged'] for trial in found)} | {sum(trial['lost'] for trial in found)} | "
            f"{sum(trial['doubled'] for trial in found)} | "
            f"{max(trial['updates_repeated'] for trial in found)} |"
        )
    loads = [trial["foreign_load"] for found in data["faults"].values() for trial in found]
    lines += ["", f"Other processes used {statistics.median(loads):.1f} CPU cores meanwhile (median)."]
    return "\n".join(lines) + "\n"
