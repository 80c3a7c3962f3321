"""Kills, corrupts and fills up a replay, and judges every row and many batches that a reader gets afterwards.

`python -m bench chaos_replay` writes docs/results/chaos-replay.json and the tables in docs/reliability.md.
Between `bench.replay_kills` and `bench.replay_faults`, which do it, and whoever asks what it costs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.load import Load, Row
from bench.replay_faults import Damages, Fill, corrupt, fill
from bench.replay_kills import CASES, PROCESSES, Toll, kill_case
from bench.report import DOCS, RESULTS, between
from system.errors import IntegrityError

RELIABILITY = DOCS / "reliability.md"
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 1 << 30
"""Free room there with which the drill is not slowed down by a disk."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs, spread over the cases")
    parser.add_argument("--corruptions", type=int, default=1000, help="damaged files, spread over the kinds")
    parser.add_argument("--fills", type=int, default=5, help="times a small disk is filled up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="where the replays are made; memory when it has room")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "chaos-replay.json", help="where the figures go"
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per case and figure.

    Raises: IntegrityError when something was lost, doubled, torn, served wrong, crashed or stopped;
    InfrastructureError when the machine does not let processes start or disks be mounted.
    """
    place = options.root or roomy_place()
    PROCESSES.set_forkserver_preload(["bench.replay_lives", "bench.replay_faults"])
    seconds: dict[str, float] = {}
    begun = time.monotonic()
    with Load() as load:
        tolls = {
            name: kill_case(name, options.kills * (number + 1) // len(CASES) - done, options.seed, place)
            for number, name in enumerate(CASES)
            for done in [options.kills * number // len(CASES)]
        }
        seconds["kills"] = time.monotonic() - begun
        damages = corrupt(options.corruptions, options.seed, place)
        seconds["corruptions"] = time.monotonic() - begun - seconds["kills"]
        fills = [fill(options.seed + number) for number in range(options.fills)]
    data = {
        "command": f"python -m bench chaos_replay --kills {options.kills} "
        f"--corruptions {options.corruptions} --fills {options.fills} --seed {options.seed}",
        "seconds": seconds,
        "foreign_load": load.foreign,
        "kills": {name: asdict(toll) for name, toll in tolls.items()},
        "corruptions": {kind: asdict(found) for kind, found in damages.items()},
        "fills": [asdict(found) for found in fills],
    }
    write_results(options.results, data)
    yield from _rows(data)
    if wrong := faults(tolls, damages, fills):
        raise IntegrityError(
            f"the replay broke its promises: {'; '.join(wrong)}; see {options.results} and the log"
        )


def roomy_place() -> Path | None:
    """A directory in memory, None for the default of temporary files."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES
    return MEMORY if roomy else None


def faults(tolls: dict[str, Toll], damages: dict[str, Damages], fills: list[Fill]) -> list[str]:
    """What must not be, as sentences; empty when all promises held."""
    found: list[str] = []
    for name, toll in tolls.items():
        if toll.lost or toll.doubled or toll.torn:
            found.append(f"{name}: {toll.lost} rows lost, {toll.doubled} doubled, {toll.torn} torn")
    for kind, damage in damages.items():
        if damage.served or damage.crashed or damage.stopped:
            found.append(
                f"{kind}: {damage.served} served, {damage.crashed} crashed, {damage.stopped} stopped streams"
            )
    for number, full in enumerate(fills):
        if full.exit_code != 0 or not full.kept or not full.refused:
            found.append(f"full disk {number}: exit code {full.exit_code}, rows kept: {full.kept}")
    return found


def _rows(data: dict[str, Any]) -> Iterator[Row]:
    for name, toll in data["kills"].items():
        for metric, unit in (("lost", "rows"), ("doubled", "rows"), ("torn", "sequences")):
            yield _row(data, name, metric, unit, toll[metric], toll["kills"])
    for kind, found in data["corruptions"].items():
        yield _row(data, kind, "served", "corruptions", found["served"], found["injected"])
        lost = statistics.median(found["rows_lost"])
        yield _row(data, kind, "rows_lost", "rows", lost, found["injected"])
    kept = sum(full["kept"] for full in data["fills"])
    yield _row(data, "full disk", "kept", "fills", kept, len(data["fills"]))


def _row(data: dict[str, Any], case: str, metric: str, unit: str, value: float, n: int) -> Row:
    load = data["foreign_load"]
    return Row(bench="chaos_replay", case=case, metric=metric, value=value, unit=unit, n=n, foreign_load=load)


def write_results(path: Path, data: dict[str, Any]) -> None:
    """Keep the figures and renew the tables made of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    if path == RESULTS / "chaos-replay.json":
        RELIABILITY.write_text(between(RELIABILITY.read_text(), "chaos-replay", tables(data)))


def tables(data: dict[str, Any]) -> str:
    """The tables of docs/reliability.md."""
    seconds = data["seconds"]
    lines = [
        f"`{data['command']}`: kills took {seconds['kills']:.0f} s, corruptions "
        f"{seconds['corruptions']:.0f} s; other processes used {data['foreign_load']:.1f} CPU cores.",
        "",
        *_kill_table(data["kills"]),
        "",
        *_corruption_table(data["corruptions"]),
    ]
    fills = data["fills"]
    if fills:
        signals = sum(full["exit_code"] is None or full["exit_code"] < 0 for full in fills)
        kept = sum(full["kept"] for full in fills)
        lines += [
            "",
            "| full disk | died by a signal | held back and went on with every row |",
            "|---|---|---|",
        ]
        lines += [f"| {len(fills)} | {signals} | {kept} |"]
    return "\n".join(lines) + "\n"


def _kill_table(kills: dict[str, Any]) -> list[str]:
    columns = {
        "kills": "kills", "rows acknowledged": "acknowledged", "lost": "lost", "doubled": "doubled",
        "torn": "torn", "sequences drawn": "sequences", "segments sealed": "sealed",
        "compressed": "compressed", "moved": "moved", "rows evicted": "evicted",
        "checkpoints restored": "restored",
    }  # fmt: skip
    lines = [f"| killed | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, toll in kills.items():
        lines.append(f"| {name} | {' | '.join(str(toll[key]) for key in columns.values())} |")
    sums = [sum(toll[key] for toll in kills.values()) for key in columns.values()]
    return [*lines, f"| all | {' | '.join(map(str, sums))} |"]


def _corruption_table(corruptions: dict[str, Any]) -> list[str]:
    keys = ("injected", "served", "crashed", "stopped", "refused", "sequences")
    lines = [
        "| file | corruptions | served wrong | crashes | streams stopped | opening refused | "
        "sequences drawn | rows lost, median | most |",
        "|---" * 9 + "|",
    ]
    for kind, found in corruptions.items():
        lost = found["rows_lost"]
        cells = [found[key] for key in keys]
        lines.append(f"| {kind} | {_cells(cells)} | {statistics.median(lost):g} | {max(lost)} |")
    sums = [sum(found[key] for found in corruptions.values()) for key in keys]
    every = [rows for found in corruptions.values() for rows in found["rows_lost"]]
    if every:
        lines.append(f"| all | {_cells(sums)} | {statistics.median(every):g} | {max(every)} |")
    return lines


def _cells(values: list[int]) -> str:
    return " | ".join(map(str, values))
