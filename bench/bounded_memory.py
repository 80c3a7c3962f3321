"""Does a replay much larger than memory stay within it? All of it runs in a control group with little memory.

Shard, writer and a learner without a model share one memory-limited group; the replay on disk is several
times the limit and evicts all the time. From outside, once a second: anonymous memory (heap and stacks, which
only the processes themselves can give back), mapped and cached file pages (which the kernel takes back when
it needs them; they fill the limit, and should), kills for want of memory, and the train ratio.
*Flat* means the anonymous memory: its slope is what would end a run after days.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.cgroup import GroupMemory, MemoryGroup
from bench.load import Load, Row
from bench.ratio import Mark, ratio_rows, ratio_table
from bench.ratio_fleet import TABLES, Child, reader_child, shard_child, writer_child
from replay import layout
from replay.catalog import Catalog
from system.errors import DeadlineError, InfrastructureError

BATCH, LENGTH = 16, 64
UPDATE_ROWS = BATCH * LENGTH
ENVS, CHUNK = 8, 16
CASE = "image"
FILL_RATE = 20_000.0
FILL_SECONDS = 900.0
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure, once it is full")
    parser.add_argument("--window", type=int, default=60, help="seconds of a window of the train ratio")
    parser.add_argument("--memory-mib", type=int, default=512, help="memory of the whole group")
    parser.add_argument("--times", type=float, default=4.0, help="size of the replay over the memory")
    parser.add_argument("--train-ratio", type=float, default=32.0, help="trained rows per inserted row")
    parser.add_argument("--update-ms", type=float, default=150.0, help="time of one update")
    parser.add_argument("--segment-rows", type=int, default=None, help="rows of a segment; default: chosen")
    parser.add_argument("--warmup", type=float, default=20.0, help="seconds of training before measuring")
    parser.add_argument("--seed", type=int, default=0, help="seed of the batches")
    parser.add_argument(
        "--root", type=Path, default=None, help="directory for the replay; default: temporary"
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Memory by kind, its slope, kills, and the train ratio meanwhile."""
    limit = options.memory_mib * MIB
    capacity = int(options.times * limit / TABLES[CASE]().row_nbytes)
    with (
        tempfile.TemporaryDirectory(prefix="bench-memory-", dir=options.root) as name,
        MemoryGroup(limit) as group,
        ExitStack() as stack,
        Load() as load,
    ):
        root = Path(name)
        learner = _start(root, group, capacity, options, stack)
        _wait_full(root, capacity, learner)
        time.sleep(options.warmup)
        marks, memory = _watch(root, group, learner, options.seconds)
        on_disk = _disk_bytes(root)
    case = f"{options.times:g} x {options.memory_mib} MiB"
    yield from _memory_rows(case, marks, memory, limit, on_disk)
    foreign = load.foreign
    yield from ratio_rows(
        "bounded_memory", case, marks, options.window, options.train_ratio, UPDATE_ROWS, foreign
    )
    yield from ratio_table("bounded_memory", marks, options.window, options.train_ratio)


def _start(
    root: Path, group: MemoryGroup, capacity: int, options: argparse.Namespace, stack: ExitStack
) -> Child:
    """Shard, writer and learner inside the group; returns the learner."""
    shard, port = shard_child(
        root, 0, CASE, capacity, grant=capacity, segment=options.segment_rows, before=group.enter
    )
    stack.callback(shard.close)
    learner = reader_child(
        root, [port], CASE,
        batch=BATCH, length=LENGTH, ratio=options.train_ratio, prefill=capacity,
        update_seconds=options.update_ms / 1e3, seed=options.seed, before=group.enter,
    )  # fmt: skip
    stack.callback(learner.close)
    learner.listen()
    writer = writer_child(
        port, CASE, 0, 0, rate=FILL_RATE, envs=ENVS, chunk=CHUNK, seed=options.seed, before=group.enter
    )
    stack.callback(writer.close)
    return learner


def _wait_full(root: Path, capacity: int, learner: Child) -> None:
    """Wait until the replay has evicted for the first time and training runs. Raises: DeadlineError."""
    deadline = time.monotonic() + FILL_SECONDS
    book = Catalog(layout.shard_dir(root, 0), writable=False)
    while book["inserted"] <= capacity or not _said(learner).get("trained"):
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the replay holds {book['inserted']} of {capacity} rows after {FILL_SECONDS:g} s "
                f"({_said(learner).get('line')}); use a faster disk or a lower --times"
            )
        _require_alive(learner)
        time.sleep(0.2)


def _watch(
    root: Path, group: MemoryGroup, learner: Child, seconds: float
) -> tuple[list[Mark], list[GroupMemory]]:
    book = Catalog(layout.shard_dir(root, 0), writable=False)
    marks: list[Mark] = []
    memory: list[GroupMemory] = []
    begun = time.monotonic()
    for second in range(int(seconds) + 1):
        time.sleep(max(0.0, begun + second - time.monotonic()))
        _require_alive(learner)
        now, trained = time.monotonic() - begun, int(_said(learner)["trained"])
        marks.append(Mark(time=now, inserted=book["inserted"], trained=trained))
        memory.append(group.read())
    return marks, memory


def _disk_bytes(root: Path) -> int:
    """Bytes of the replay on disk while it goes on evicting."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).stat().st_blocks * 512
    return total


def _require_alive(learner: Child) -> None:
    if not learner.alive:
        raise InfrastructureError("the learner process ended early; see its message above")


def _said(learner: Child) -> dict[str, Any]:
    return json.loads(learner.said or "{}")


def _memory_rows(
    case: str, marks: list[Mark], memory: list[GroupMemory], limit: int, on_disk: int
) -> Iterator[Row]:
    kinds = {
        kind: np.array([getattr(now, kind) for now in memory]) / MIB  # [seconds], MiB
        for kind in ("anon", "file", "mapped", "usage")
    }
    times = np.array([mark.time for mark in marks])
    slope = float(np.polyfit(times, kinds["anon"], 1)[0]) * 600 if len(times) > 1 else 0.0
    values: dict[str, tuple[float, str]] = {
        "replay_on_disk": (on_disk / MIB, "MiB"),
        "disk_to_memory": (on_disk / limit, "x"),
        "anon_slope": (slope, "MiB/10 min"),
        "anon_first": (kinds["anon"][0], "MiB"),
        "anon_last": (kinds["anon"][-1], "MiB"),
        **{f"{kind}_max": (float(values.max()), "MiB") for kind, values in kinds.items()},
        "oom_kills": (memory[-1].oom_kills, "kills"),
    }
    for metric, (value, unit) in values.items():
        yield Row(bench="bounded_memory", case=case, metric=metric, value=float(value), unit=unit)
    for second in range(0, len(memory), 60):
        yield Row(
            bench="bounded_memory", case=f"second {second}", metric="anon", unit="MiB",
            value=float(kinds["anon"][second]),
        )  # fmt: skip
