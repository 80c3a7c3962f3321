"""Kills processes of a replay at random moments and judges what is left, row by row.

A trial begins one life of the process under test (and of those it needs), sends SIGKILL after a random
time, and reads every row that a reader would be served. Nothing may be wrong, doubled, or, if it was
acknowledged and not evicted, missing.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.damage import Served, copy_replay, read_all
from bench.replay_batches import Known, draw
from bench.replay_lives import (
    CUTS,
    LIVES,
    READY,
    REPLAY,
    SEGMENT_ROWS,
    TABLE,
    acknowledged,
    open_shard,
)  # fmt: skip
from replay import layout, seal
from replay.cut import Cut
from replay.ledger import read_ledger
from replay.restore import restore_exact
from system.errors import InfrastructureError

KEEPING, EVICTING = 1 << 20, 3072
TRIALS_PER_FOLDER = 10
LONGEST_LIFE_SECONDS = 0.4
UNFINISHED_STARTS = 0.25
"""Share of the kills that do not wait until the victim works: they meet it while it opens."""
BATCHES = 20
"""Drawn after every kill."""
START_SECONDS = 60.0
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is killed. `helpers` live through the trial, e.g. the shard that a writer sends to."""

    victim: str
    capacity_rows: int = KEEPING
    helpers: tuple[str, ...] = ()


CASES = {
    "writer": Case(victim="write", helpers=("serve",)),
    "shard behind a writer": Case(victim="serve"),
    "shard: append, seal, compress": Case(victim="own"),
    "shard: append, seal, compress, evict": Case(victim="own", capacity_rows=EVICTING),
    "learner: pin, write back, prune": Case(victim="checkpoint", helpers=("own",)),
    "mover between two shards": Case(victim="shift"),
}


@dataclass(slots=True, kw_only=True)
class Toll:
    """What the kills of one case cost. Filled by `kill_case`."""

    kills: int = 0
    acknowledged: int = 0  # rows, over all folders
    lost: int = 0  # acknowledged, not evicted, not served
    doubled: int = 0
    torn: int = 0  # runs of rows or sequences of batches that are not what was appended
    sequences: int = 0  # drawn in batches after the kills
    sealed: int = 0  # segments, all that follow as found after the last kill of a folder
    compressed: int = 0
    moved: int = 0
    evicted: int = 0  # rows
    restored: int = 0  # checkpoints brought back exactly


def kill_case(name: str, kills: int, seed: int, place: Path | None) -> Toll:
    """Kill the case's victim `kills` times."""
    rng, case, toll, known = random.Random(f"{name} {seed}"), CASES[name], Toll(), Known(TABLE)
    while toll.kills < kills:
        with tempfile.TemporaryDirectory(prefix="chaos-replay-", dir=place) as folder:
            home = Path(folder)
            for _ in range(min(TRIALS_PER_FOLDER, kills - toll.kills)):
                _kill_once(home, case, rng)
                toll.kills += 1
                judge(home, case, toll, known)
            toll.acknowledged += sum(acknowledged(home).values())
            _count_work(home / REPLAY, case, toll)
    return toll


def _kill_once(home: Path, case: Case, rng: random.Random) -> None:
    with _living(home, case, rng, case.helpers):
        writers = ("write",) if case.victim == "serve" else ()
        patient = bool(writers) or rng.random() >= UNFINISHED_STARTS
        with _living(home, case, rng, (case.victim, *writers), patient=patient) as (victim, *_):
            time.sleep(rng.random() * LONGEST_LIFE_SECONDS)
            victim.kill()
            victim.join(START_SECONDS)


@contextmanager
def _living(
    home: Path, case: Case, rng: random.Random, names: tuple[str, ...], *, patient: bool = True
) -> Iterator[list[BaseProcess]]:
    """One life of each, begun when the one before it works; killed when the block ends."""
    lives: list[BaseProcess] = []
    try:
        for name in names:
            (home / READY).unlink(missing_ok=True)
            process = PROCESSES.Process(
                target=LIVES[name], args=(home, rng.randrange(1 << 30), case.capacity_rows), daemon=True
            )
            process.start()
            lives.append(process)
            if patient:
                _wait(home / READY, process, name)
        yield lives
    finally:
        for process in lives:
            process.kill()
            process.join(START_SECONDS)


def _wait(path: Path, process: BaseProcess, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if not process.is_alive() or time.monotonic() > deadline:
            raise InfrastructureError(
                f"a life of `{name}` ended or hung before it worked (exit code {process.exitcode}); "
                "see its message"
            )
        time.sleep(0.002)


def judge(home: Path, case: Case, toll: Toll, known: Known) -> None:
    """Add to `toll` what is wrong in the replay that a kill left in `home`."""
    served = read_all(home / REPLAY, TABLE)
    drawn = draw(home / REPLAY, known, BATCHES, toll.kills)
    toll.sequences += drawn.sequences
    toll.torn += len(drawn.wrong)
    promised = acknowledged(home)
    toll.torn += sum("twice" not in wrong for wrong in served.wrong)
    toll.doubled += served.doubled
    toll.lost += lost_rows(served, promised, case.capacity_rows)
    if case.victim == "checkpoint":
        _judge_checkpoints(home, toll)


def lost_rows(served: Served, promised: dict[int, int], capacity_rows: int) -> int:
    """Acknowledged rows that are not served although nothing evicted them.

    Evicting takes the oldest rows of a stream only, and leaves at least the capacity but for two segments.
    """
    lost = 0
    for env, stored in promised.items():
        numbers = served.numbers.get((0, env), frozenset())
        first = min(numbers, default=stored) if capacity_rows != KEEPING else 0
        lost += len(set(range(first, stored)) - numbers)
    floor = min(sum(promised.values()), capacity_rows - 2 * SEGMENT_ROWS)
    return lost + max(0, floor - served.rows) * (capacity_rows != KEEPING)


def _judge_checkpoints(home: Path, toll: Toll) -> None:
    """Bring a copy back to the newest checkpoint that was completed: every row of its cut, and no other."""
    saved = sorted((home / CUTS).glob("0*.json"))
    if not saved:
        return
    cut = Cut.from_json(json.loads(saved[-1].read_text()))
    with tempfile.TemporaryDirectory(prefix="chaos-restore-", dir=home.parent) as folder:
        copy = Path(folder) / REPLAY
        copy_replay(home / REPLAY, copy)
        restore_exact(copy, saved[-1].stem, cut)
        open_shard(copy, 0, KEEPING).close()
        served = read_all(copy, TABLE)
    toll.torn += len(served.wrong)
    toll.lost += max(0, cut.rows - served.rows)
    toll.doubled += max(0, served.rows - cut.rows)
    toll.restored += 1


def _count_work(root: Path, case: Case, toll: Toll) -> None:
    """Count what the lives got done besides appending."""
    for index in layout.shard_indices(root):
        directory = layout.shard_dir(root, index)
        stored = layout.stored_segments(directory, index)
        for origin, place in layout.adopted_dirs(directory).items():
            found = layout.stored_segments(place, origin)
            toll.moved += len(found)
            stored += found
        toll.sealed += sum(seal.is_sealed(segment.path) for segment in stored)
        toll.compressed += sum(segment.tier == "cold" for segment in stored)
        ledger, _ = read_ledger(directory)
        if ledger is not None and case.capacity_rows != KEEPING:  # elsewhere what was moved counts as such
            toll.evicted += ledger.evicted_rows
