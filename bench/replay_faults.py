"""Damages files of a replay one at a time, and fills its disk; judges what a reader is served afterwards.

A corruption counts as contained when no row is served that was not appended, first by a reader alone, then
by one behind a shard that opened the damaged directory and mended it.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.damage import DAMAGES, Served, Victim, copy_replay, read_all, victims
from bench.replay_batches import Known, draw
from bench.replay_kills import KEEPING, PROCESSES, START_SECONDS
from bench.replay_lives import ENVS, READY, REPLAY, TABLE, fill_disk, latents, open_shard
from replay import layout, synthetic
from replay.rows import write_overlay
from replay.view import TableView
from system.errors import DreamfleetError, InfrastructureError, RejectedError
from system.experience import StreamId

log = logging.getLogger(__name__)

ROWS, NEW_ROWS = 480, 5
"""Rows of each stream before the damage and appended behind it."""
NEW = frozenset(range(ROWS, ROWS + NEW_ROWS))
BATCHES = 20
STRANGER = 7
"""The actor of another run with the same schema, whose segments are swapped in."""
SWAPPED = "segment swapped"
SWAPS = {"raw": "0*[0-9].zarr", "cold": "0*.cold.zarr", "overlay": "0*.overlay.zarr"}
"""What is taken from the other run, by the names it has in a shard directory."""
DISK_BYTES = 24 << 20


@dataclass(slots=True, kw_only=True)
class Damages:
    """What corruptions of one kind of file did. Filled by `corrupt`."""

    injected: int = 0
    served: int = (
        0  # corruptions after which a reader got a row, or a batch a sequence, that was not appended
    )
    crashed: int = 0  # something ended with an error that is not one of ours
    stopped: int = 0  # the shard opened, but a stream could not go on
    refused: int = 0  # opening said what is wrong and served nothing
    sequences: int = 0  # drawn in batches from damaged and mended replays
    rows_lost: list[int] = field(default_factory=list[int])  # per corruption, of those a reader had before


def corrupt(count: int, seed: int, place: Path | None) -> dict[str, Damages]:
    """Inject `count` corruptions into copies of a replay with raw, compressed and growing segments."""
    rng, known = random.Random(seed), Known(TABLE)
    found: dict[str, Damages] = {}
    with tempfile.TemporaryDirectory(prefix="chaos-replay-", dir=place) as folder:
        home = Path(folder)
        ours, theirs = home / "ours", home / "theirs"
        make_template(ours, 0)
        make_template(theirs, STRANGER)
        whole = read_all(ours / REPLAY, TABLE).rows
        by_kind: dict[str, list[Victim]] = {}
        for victim in victims(ours / REPLAY):
            by_kind.setdefault(victim.kind, []).append(victim)
        cases = [(kind, damage) for kind in sorted(by_kind) for damage in DAMAGES]
        cases += [(SWAPPED, tier) for tier in SWAPS]
        for number in range(count):
            kind, how = cases[number % len(cases)]
            copy = home / f"copy-{number}"
            copy_replay(ours / REPLAY, copy)
            if kind == SWAPPED:
                swap(copy, theirs / REPLAY, SWAPS[how], rng)
                about = f"{kind} {how}"
            else:
                victim = rng.choice(by_kind[kind]).path.relative_to(ours / REPLAY)
                DAMAGES[how](copy / victim, rng)
                about = f"{how} {victim}"
            judge(copy, whole, found.setdefault(kind, Damages()), known, about)
            shutil.rmtree(copy)
    return found


def make_template(home: Path, actor: int) -> None:
    """A replay whose owner was killed: compressed, sealed and growing segments of a few rows."""
    home.mkdir()
    process = PROCESSES.Process(target=_live, args=(home, actor), daemon=True)
    process.start()
    deadline = time.monotonic() + START_SECONDS
    while not (home / READY).exists():
        if not process.is_alive() or time.monotonic() > deadline:
            raise InfrastructureError("the replay to be damaged could not be made; see the message above")
        time.sleep(0.01)
    process.kill()
    process.join(START_SECONDS)


def _live(home: Path, actor: int) -> None:
    """Append until segments are compressed, sealed and growing, write latents back, wait to be killed."""
    shard = open_shard(home / REPLAY, 0, KEEPING)
    for start in range(0, ROWS, 40):
        chunks = [synthetic.rows(TABLE, StreamId(actor=actor, env=env), start, 40) for env in range(ENVS)]
        shard.append(chunks, START_SECONDS)
        shard.settle(START_SECONDS)
    view = TableView(home / REPLAY, TABLE, 1)
    view.settle(START_SECONDS)
    for _, stream in list(view.index.streams):
        for start in range(10, ROWS - 20, 60):
            write_overlay(TABLE, view.index, latents(0, stream, start, random.Random(start)))
    view.release()
    (home / READY).touch()
    time.sleep(600)


def swap(copy: Path, theirs: Path, pattern: str, rng: random.Random) -> None:
    """Put a segment of another run in the place of one of ours."""
    mine, strangers = (sorted(layout.shard_dir(root, 0).glob(pattern)) for root in (copy, theirs))
    number = rng.randrange(min(len(mine), len(strangers)))
    shutil.rmtree(mine[number])
    shutil.copytree(strangers[number], mine[number])


def judge(copy: Path, whole: int, damages: Damages, known: Known, about: str) -> None:
    """Read and draw from a damaged replay, open its shard, go on with its streams, read and draw again."""
    damages.injected += 1
    rows = 0
    try:
        wrong, _ = _served(copy, damages, known)
        with closing(open_shard(copy, 0, KEEPING)) as shard:
            for env in range(ENVS):
                shard.append([synthetic.rows(TABLE, StreamId(actor=0, env=env), ROWS, NEW_ROWS)], 5.0)
        after, served = _served(copy, damages, known)
        wrong += after
        new = sum(len(numbers & NEW) for numbers in served.numbers.values())
        rows = served.rows - new
        damages.stopped += new != ENVS * NEW_ROWS
        if wrong:
            log.error("corruption served", extra={"damage": about, "wrong": wrong[:3]})
        damages.served += bool(wrong)
    except RejectedError:
        log.exception("a stream stopped after: %s", about)
        damages.stopped += 1
    except DreamfleetError:
        damages.refused += 1
    except Exception:  # whatever it is, it is what the drill looks for
        log.exception("crash after: %s", about)
        damages.crashed += 1
    damages.rows_lost.append(whole - rows)


def _served(root: Path, damages: Damages, known: Known) -> tuple[list[str], Served]:
    """What a reader gets that is wrong, and what it gets."""
    drawn = draw(root, known, BATCHES, damages.injected)
    damages.sequences += drawn.sequences
    served = read_all(root, TABLE)
    strangers = [f"a row of actor {actor}" for actor, _ in served.numbers if actor != 0]
    return [*drawn.wrong, *served.wrong, *strangers], served


# ---- a full disk ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """One full disk. Made by `fill`."""

    exit_code: int | None  # negative: died of that signal
    refused: str  # what the append said
    kept: bool  # every row acknowledged before and after is served, and none is wrong


def fill(seed: int) -> Fill:
    """Let a shard fill a small disk of its own, then give it room.

    Raises: InfrastructureError when nothing may be mounted here.
    """
    with _small_disk() as home:
        process = PROCESSES.Process(target=fill_disk, args=(home, seed, KEEPING), daemon=True)
        process.start()
        process.join(START_SECONDS)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join(START_SECONDS)
        report = home / "report.json"
        if not report.exists():
            return Fill(exit_code=code, refused="", kept=False)
        said = json.loads(report.read_text())
        served = read_all(home / REPLAY, TABLE)
        kept = not served.wrong and served.rows == said["after"] > said["before"]
        return Fill(exit_code=code, refused=said["refused"], kept=kept)


@contextmanager
def _small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chaos-disk-") as folder:
        size = f"size={DISK_BYTES}"
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise InfrastructureError(
                f"a small disk cannot be mounted ({getattr(error, 'stderr', '') or error}); run as root"
            ) from error
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=False)
