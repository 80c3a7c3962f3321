"""Named corruptions of a replay directory, and a reader that knows what every row must hold.

For tests and `make chaos-replay`. A file is damaged by putting a changed copy in its place: live maps of the
old one stay whole, as they would when a disk returns something else than was written.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replay import layout, synthetic
from replay.admission import stream_of
from replay.index import StreamRuns
from replay.ledger import NAMES, read_ledger, save_ledger
from replay.rows import Home, RowsGone, RowViews
from replay.view import TableView
from system.experience import StreamId
from system.specs import TableSpec

PAGE = 4096
SETTLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A file of a replay directory and what it is for. Made by `victims`."""

    kind: str
    path: Path


def victims(root: Path) -> list[Victim]:
    """Every file under `root` that the replay reads, by kind and path."""
    found: list[Victim] = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and not {layout.SCRATCH, layout.QUARANTINE, "pins"} & set(inside.parts):
            found.append(Victim(kind=_kind(inside), path=path))
    return [victim for victim in found if victim.kind != "other"]


def _kind(inside: Path) -> str:
    name, parts = inside.name, inside.parts
    small = {
        "table.json": "table", "shard.json": "shard", "ledger.json": "ledger",
        "ledger.copy.json": "ledger copy",
        "catalog.bin": "catalog", "verified.json": "verified", "flushed.json": "flushed",
        "sealed.json": "manifest",
    }  # fmt: skip
    if name in small:
        return small[name]
    if name.endswith(".far.json"):
        return "far manifest"
    if len(parts) < 3 or ".zarr" not in inside.as_posix():
        return "other"
    group, array = next((p, parts[i + 1]) for i, p in enumerate(parts) if p.endswith(".zarr"))
    place = "overlay " if ".overlay." in group else ""
    if name == "zarr.json":
        return place + ("group metadata" if array == name else "array metadata")
    return place + {"committed": "commit words", "_slots": "slots", "_check": "checks"}.get(array, "rows")


def flip(path: Path, rng: random.Random) -> None:
    """Turn one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _put(path, bytes(data))


def truncate(path: Path, rng: random.Random) -> None:
    """Cut the end off."""
    data = path.read_bytes()
    _put(path, data[: rng.randrange(len(data))] if data else data)


def delete(path: Path, rng: random.Random) -> None:
    """Remove the file."""
    path.unlink()


def garbage(path: Path, rng: random.Random) -> None:
    """Overwrite everything with noise of the same length."""
    _put(path, rng.randbytes(path.stat().st_size))


def zero_page(path: Path, rng: random.Random) -> None:
    """What power loss leaves where a page had not been written."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(1, -(-len(data) // PAGE))) * PAGE
    data[at : at + PAGE] = bytes(len(data[at : at + PAGE]))
    _put(path, bytes(data))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip, "truncate": truncate, "delete": delete, "garbage": garbage, "zero page": zero_page,
}  # fmt: skip


def swap_segments(first: Path, second: Path) -> None:
    """Exchange two segment directories, e.g. of two runs with one schema."""
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def power_loss(root: Path, rng: random.Random, share: float) -> None:
    """Pretend the machine restarted: zero a share of the pages of unsealed segments, change the boot id."""
    for index in layout.shard_indices(root):
        directory = layout.shard_dir(root, index)
        for segment in layout.segment_paths(directory).values():
            if not (segment / "committed/sealed.json").exists():
                for path in [*segment.rglob("c/*"), *layout.overlay_path(segment).rglob("c/*")]:
                    if path.is_file():
                        _lose_pages(path, rng, share)
                for path in [p for p in segment.rglob("0") if p.is_file()]:
                    _lose_pages(path, rng, share)
        another_boot(directory)


def another_boot(directory: Path) -> None:
    """Make the ledger of a shard say that it was opened in another boot of the machine."""
    ledger, _ = read_ledger(directory)
    if ledger is not None:
        ledger.boot = "another"
        save_ledger(directory, ledger)


def _lose_pages(path: Path, rng: random.Random, share: float) -> None:
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), PAGE):
        if rng.random() < share:
            data[at : at + PAGE] = bytes(len(data[at : at + PAGE]))
    _put(path, bytes(data))


def _put(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}-damaged")
    draft.write_bytes(data)
    shutil.copymode(path, draft)
    draft.replace(path)


# ---- what a reader is served ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What `read_all` found."""

    rows: int
    numbers: dict[tuple[int, int], frozenset[int]]  # row numbers by actor and env
    wrong: tuple[str, ...]  # rows that are not what they must be, doubled or out of order
    doubled: int = 0  # rows served more than once, by one shard or by several


def read_all(root: Path, table: TableSpec) -> Served:
    """Read every row that a reader would be served, and compare it with what `synthetic.rows` made.

    Rows must be of incarnation 0, at most once each, consecutive where the index says so; overlays as in
    `strange_latents`.
    Raises: as TableView.
    """
    view = TableView(root, table, 1)
    view.settle(SETTLE_SECONDS)
    view.refresh()
    wrong: list[str] = []
    found: dict[StreamId, list[int]] = {}  # over all shards
    for (_, key), runs in view.index.streams.items():
        stream = stream_of(key)
        seen = found.setdefault(stream, [])
        for lo, hi in runs.bounds:
            for columns in _pieces(table, runs, lo, hi):
                got = synthetic.row_number(columns)
                wanted = np.arange(got[0], got[0] + len(got))
                if not np.array_equal(got, wanted):
                    wrong.append(f"{stream} positions {lo}..{hi} hold rows {got[:3]}... out of order")
                    continue
                made = synthetic.rows(table, stream, int(got[0]), len(got)).columns
                bad = [name for name in table.columns if not np.array_equal(columns[name], made[name])]
                bad += [n for n in table.overlay if strange_latents(columns[n], made[n]).any()]
                if bad:
                    wrong.append(f"{stream} rows {got[0]}..{got[-1]} differ in {bad}")
                seen += got.tolist()
    view.release()
    twice = {stream: len(seen) - len(set(seen)) for stream, seen in found.items()}
    wrong += [f"{stream} has {rows} rows twice" for stream, rows in twice.items() if rows]
    numbers = {(stream.actor, stream.env): frozenset(seen) for stream, seen in found.items()}
    rows = sum(map(len, numbers.values()))
    return Served(rows=rows, numbers=numbers, wrong=tuple(wrong), doubled=sum(twice.values()))


def strange_latents(got: np.ndarray, appended: np.ndarray) -> np.ndarray:
    """Which overlay rows [T, ...] are neither what was appended nor of one value throughout [T].

    Drills write such constants back; zeros are what damaged latents become.
    """
    got, appended = got.reshape(len(got), -1), appended.reshape(len(got), -1)
    return (got != appended).any(axis=1) & (got != got[:, :1]).any(axis=1)


def _pieces(table: TableSpec, runs: StreamRuns[Home], lo: int, hi: int) -> Iterator[dict[str, np.ndarray]]:
    """Columns of a fragment, in order, by piece."""
    for piece in runs.pieces(lo, hi - lo):
        arrays = {n: np.zeros((piece.rows, *s.shape), s.dtype) for n, s in table.all.items()}
        try:
            piece.home.copy_rows(RowViews(arrays), 0, piece.first, piece.rows)
        except RowsGone:
            continue
        yield arrays


def ledger_files(directory: Path) -> list[Path]:
    """Both copies of a shard's ledger."""
    return [directory / name for name in NAMES if (directory / name).exists()]


def copy_replay(source: Path, target: Path) -> None:
    """A replay's files without what only a living owner holds."""
    shutil.copytree(source, target)
    for lock in target.rglob("shard.lock"):
        os.truncate(lock, 0)
