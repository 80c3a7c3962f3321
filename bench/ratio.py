"""Is the train ratio held over every window while everything that can go wrong with actors goes wrong?

Shards in processes of their own behind gRPC, writers that stand for actors, a reader with its limiter and the
learner's own prefetching. By a seed writers change speed, are stopped, killed, replaced and added, the
learner pauses, and shards are killed, restarted and stopped. Rows inserted are read from the shards' own
books, trained rows are those of the batches the learner took: nothing here asks the limiter.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.load import Load, Row
from bench.ratio_fleet import CONTEXT, DEPTH, TABLES, Child, shard_child, writer_child
from learner.batches import Batches
from replay import layout
from replay.catalog import Catalog
from replay.client import GrpcShardControl
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from system.errors import DeadlineError
from system.seeds import generator

BATCH, LENGTH = 8, 32
UPDATE_ROWS = BATCH * LENGTH
RATIO = 8.0
PREFILL, TOLERANCE = 1024, 1024
ENVS, CHUNK = 4, 16
CASE = "vector"
CAPACITY_ROWS = 100_000
TABLE_SECONDS = 30
START_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure, after warm-up")
    parser.add_argument("--window", type=int, default=60, help="seconds of a window; every second one ends")
    parser.add_argument("--shards", type=int, default=3, help="replay shard processes")
    parser.add_argument("--writers", type=int, default=4, help="writer processes at the start")
    parser.add_argument("--rate", type=float, default=300.0, help="rows per second that one writer makes")
    parser.add_argument("--update-ms", type=float, default=25.0, help="mean time of one update")
    parser.add_argument(
        "--tolerance", type=int, default=None, help="rows either side may be ahead; default: fits the traffic"
    )
    parser.add_argument("--warmup", type=float, default=10.0, help="seconds of training before measuring")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that goes wrong")
    parser.add_argument(
        "--root", type=Path, default=None, help="directory for the replay; default: temporary"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Counts at one second. Made by `_Recorder`, judged by `window_ratios`."""

    time: float  # seconds since warm-up
    inserted: int  # rows in the books of the shards
    trained: int  # rows of the batches taken


def window_ratios(marks: Sequence[Mark], window: int) -> list[tuple[float, float]]:
    """(end, trained rows per inserted row) of every window that ends at a mark and had rows inserted."""
    found: list[tuple[float, float]] = []
    begin = 0
    for end, mark in enumerate(marks):
        while begin + 1 < end and mark.time - marks[begin + 1].time >= window:
            begin += 1
        rows = mark.inserted - marks[begin].inserted
        if mark.time - marks[begin].time >= window - 0.5 and rows > 0:
            found.append((mark.time, (mark.trained - marks[begin].trained) / rows))
    return found


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Deviation of the held ratio over all windows, who waited, and the ratio every TABLE_SECONDS."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-ratio-", dir=options.root) as name,
        ExitStack() as stack,
        Load() as load,
    ):
        fleet = stack.enter_context(_Fleet(Path(name), options))
        learner = stack.enter_context(closing(_Learner(Path(name), fleet, options)))
        learner.warm_up(options.warmup)
        recorder = _Recorder(Path(name), options.shards, learner)
        begun = dict(learner.reader.governor.books.seconds)
        threads = [
            threading.Thread(target=recorder.run, args=(options.seconds,), daemon=True),
            threading.Thread(target=fleet.run, args=(options.seconds,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        learner.run(options.seconds)
        for thread in threads:
            thread.join(START_SECONDS)
        ended = learner.reader.governor.books.seconds
    case = f"{options.shards} shards {options.writers}+ writers"
    yield from ratio_rows("ratio", case, recorder.marks, options.window, RATIO, UPDATE_ROWS, load.foreign)
    for side, seconds in ended.items():
        yield Row(bench="ratio", case=case, metric=f"{side}_wait", value=seconds - begun[side], unit="s")
    for event, count in sorted(fleet.events.items()):
        yield Row(bench="ratio", case=case, metric=event, value=count, unit="times")
    yield from ratio_table("ratio", recorder.marks, options.window, RATIO)


def ratio_rows(
    bench: str, case: str, marks: Sequence[Mark], window: int, asked: float, update_rows: int, foreign: float
) -> Iterator[Row]:
    """How far the held ratio was off the asked one, over all windows."""
    first, last = marks[0], marks[-1]
    seconds, inserted = last.time - first.time, last.inserted - first.inserted
    trained = last.trained - first.trained
    off = np.array([abs(ratio / asked - 1) for _, ratio in window_ratios(marks, window)])  # [W]
    values = {
        "insert_rate": (inserted / seconds, "rows/s"),
        "update_rate": (trained / update_rows / seconds, "updates/s"),
        "whole_run_off": (100 * abs(trained / max(inserted, 1) / asked - 1), "%"),
        "windows": (float(len(off)), f"of {window} s"),
    }
    if len(off):
        values |= {
            "worst_off": (100 * float(off.max()), "%"),
            "mean_off": (100 * float(off.mean()), "%"),
            "within_1_percent": (100 * float((off <= 0.01).mean()), "% of windows"),
        }
    for metric, (value, unit) in values.items():
        yield Row(
            bench=bench, case=case, metric=metric, value=value, unit=unit,
            n=len(off) if "off" in metric else 1, foreign_load=foreign,
        )  # fmt: skip


def ratio_table(bench: str, marks: Sequence[Mark], window: int, asked: float) -> Iterator[Row]:
    """The held ratio every TABLE_SECONDS."""
    due = float(window)
    for end, ratio in window_ratios(marks, window):
        if end >= due:
            due += TABLE_SECONDS
            yield Row(
                bench=bench, case=f"{window} s to second {end:.0f}", metric="train_ratio", value=ratio,
                unit="rows/row", ratio=ratio / asked, ratio_to="asked",
            )  # fmt: skip


class _Recorder:
    """Once a second writes down what the shards' books and the learner's count say."""

    def __init__(self, root: Path, shards: int, learner: _Learner) -> None:
        self._books = [Catalog(layout.shard_dir(root, k), writable=False) for k in range(shards)]
        self._learner = learner
        self.marks: list[Mark] = []

    def run(self, seconds: float) -> None:
        begun = time.monotonic()
        for second in range(int(seconds) + 1):
            time.sleep(max(0.0, begun + second - time.monotonic()))
            inserted = sum(book["inserted"] for book in self._books)
            self.marks.append(
                Mark(time=time.monotonic() - begun, inserted=inserted, trained=self._learner.trained)
            )


class _Learner:
    """Takes batches as `learner.loop` does, sleeps for as long as an update takes, pauses at times."""

    def __init__(self, root: Path, fleet: _Fleet, options: argparse.Namespace) -> None:
        fixed = options.tolerance
        limiter = RateLimiter(RATIO, PREFILL, fixed or TOLERANCE, LENGTH + CONTEXT, paced=fixed is None)
        controls = [GrpcShardControl(f"127.0.0.1:{port}") for port in fleet.ports]
        self.reader = LocalReader(
            root, TABLES[CASE](), batch=BATCH, length=LENGTH, context=CONTEXT, seed=options.seed,
            limiter=limiter, controls=controls, ring=DEPTH + 2,
        )  # fmt: skip
        self._controls = controls
        self._batches = Batches(self.reader, DEPTH, 0.5, ring=DEPTH + 2)
        self._rng = generator(options.seed, "learner")
        self._update_seconds = options.update_ms / 1e3
        self.trained = 0
        self.pauses = 0

    def warm_up(self, seconds: float) -> None:
        """Wait for the prefill and for the first updates. Raises: DeadlineError."""
        deadline = time.monotonic() + START_SECONDS
        while not self.trained:
            if time.monotonic() > deadline:
                raise DeadlineError(f"no batch within {START_SECONDS:g} s: {self.reader.governor.line()}")
            self._update()
        self.run(seconds, pauses=False)

    def run(self, seconds: float, *, pauses: bool = True) -> None:
        until = time.monotonic() + seconds
        pause_at = time.monotonic() + self._rng.exponential(20.0) if pauses else math.inf
        while time.monotonic() < until:
            self._update()
            if time.monotonic() >= pause_at:
                self.pauses += 1
                time.sleep(min(self._rng.uniform(0.5, 5.0), max(0.0, until - time.monotonic())))
                pause_at = time.monotonic() + self._rng.exponential(20.0)

    def _update(self) -> None:
        with suppress(DeadlineError):
            self._batches.next()
            self.trained += UPDATE_ROWS
            time.sleep(self._update_seconds * self._rng.uniform(0.5, 1.5))

    def close(self) -> None:
        self._batches.stop()
        self.reader.close()
        for control in self._controls:
            control.close()


class _Fleet:
    """Shards and writers, and what happens to them."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self._root, self._options = root, options
        self._rng = generator(options.seed, "fleet")
        self._shards: list[Child] = []
        self.ports: list[int] = []
        self._writers: dict[int, Child] = {}  # by actor
        self._incarnations: dict[int, int] = {}
        self._resume_at: dict[int, float] = {}  # stopped writers, by actor
        self.events = dict.fromkeys(
            ("writers_stalled", "writers_killed", "writers_added", "shards_killed", "shards_stalled"), 0
        )

    def __enter__(self) -> _Fleet:
        try:
            for index in range(self._options.shards):
                self.ports.append(0)
                self._shards.append(self._shard(index))
            for actor in range(self._options.writers):
                self._start(actor)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for child in [*self._writers.values(), *self._shards]:
            child.close()

    def run(self, seconds: float) -> None:
        """Let things happen for `seconds`; a shard is killed after a third and another stalls after two."""
        begun = time.monotonic()
        plan = [(seconds / 3, self._kill_shard), (seconds * 2 / 3, self._stall_shard)]
        plan = plan if self._options.shards > 1 else []
        while (now := time.monotonic() - begun) < seconds:
            if plan and now >= plan[0][0]:
                plan.pop(0)[1]()
            self._wake(time.monotonic())
            if self._rng.random() < 0.2 / 3:
                self._something()
            time.sleep(0.2)
        self._wake(math.inf)

    def _something(self) -> None:
        """One event, about every three seconds."""
        awake = [a for a in self._writers if a not in self._resume_at]
        kind = self._rng.choice(["stall", "stall all", "kill", "add"], p=[0.5, 0.1, 0.2, 0.2])
        if kind == "add" and len(self._writers) < 2 * self._options.writers:
            self.events["writers_added"] += 1
            self._start(max(self._writers) + 1)
        elif awake and kind == "kill":
            actor = int(self._rng.choice(awake))
            self.events["writers_killed"] += 1
            self._writers[actor].kill()
            self._start(actor)
        else:
            some = awake if kind == "stall all" else [int(a) for a in self._rng.permutation(awake)[:1]]
            for actor in some:
                self.events["writers_stalled"] += 1
                self._writers[actor].stop()
                self._resume_at[actor] = time.monotonic() + self._rng.exponential(4.0)

    def _wake(self, now: float) -> None:
        for actor in [a for a, at in self._resume_at.items() if now >= at]:
            del self._resume_at[actor]
            self._writers[actor].go_on()

    def _kill_shard(self) -> None:
        self.events["shards_killed"] += 1
        self._shards[0].kill()
        time.sleep(3.0)
        self._shards[0] = self._shard(0)

    def _stall_shard(self) -> None:
        self.events["shards_stalled"] += 1
        self._shards[-1].stop()
        time.sleep(5.0)
        self._shards[-1].go_on()

    def _shard(self, index: int) -> Child:
        grant = math.ceil(PREFILL / self._options.shards)
        child, self.ports[index] = shard_child(
            self._root, index, CASE, CAPACITY_ROWS, port=self.ports[index], grant=grant
        )
        return child

    def _start(self, actor: int) -> None:
        incarnation = self._incarnations[actor] = self._incarnations.get(actor, -1) + 1
        self._writers[actor] = writer_child(
            self.ports[actor % len(self.ports)], CASE, actor, incarnation,
            rate=self._options.rate, envs=ENVS, chunk=CHUNK, seed=self._options.seed,
        )  # fmt: skip
