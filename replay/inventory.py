"""A replay as its files tell: what lies where, what is damaged, and how to mend it. For the command line.

`take_inventory` and `verify_replay` only read, beside a living owner or none. `repair_replay` owns each shard
while it works: it opens it as its owner would, every check done in full, and says what that cost.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from replay import layout, seal
from replay.layout import StoredSegment
from replay.ledger import read_ledger, save_ledger
from replay.quarantine import quarantined
from replay.recovery import bytes_on_disk
from replay.segment import Segment
from replay.shard import ReplayShard
from system.errors import DreamfleetError, IntegrityError, PreflightError, SchemaError
from system.specs import TableSpec

QUARANTINED = re.compile(r"(\d{8}-e\d{4,}\.zarr)-([a-z]+(?:-\d+)?)")
MUCH = 1 << 40
SETTLE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLine:
    """One segment. Made by `take_inventory`."""

    shard: int
    origin: int  # the shard its rows were first stored in
    name: str
    state: str  # growing | sealed | quarantined
    tier: str
    rows: int
    streams: int
    nbytes: int  # on this disk
    age_seconds: float  # since its first row, as far as known
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be. Made by `verify_replay` and `repair_replay`."""

    where: str
    reason: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What `repair_replay` did."""

    rows: int  # that can be sampled now
    lost: int  # acknowledged rows that are gone, newly found
    returned: int  # rows that came back from quarantine
    findings: tuple[Finding, ...]


def find_root(path: Path) -> Path:
    """The replay root of a run or replay directory. Raises: SchemaError when it is neither."""
    for root in (path, path / "replay"):
        if (root / "table.json").exists() or layout.shard_indices(root):
            return root
    raise SchemaError(
        f"{path} holds no replay (no table.json, no shard-0000); give a run or replay directory"
    )


def take_inventory(root: Path) -> list[SegmentLine]:
    """All segments under `root`, by shard, origin and number; what cannot be read is noted as such."""
    lines: list[SegmentLine] = []
    for index in layout.shard_indices(root):
        directory = layout.shard_dir(root, index)
        for stored in stored_in(directory, index):
            try:
                lines.append(_line(index, stored))
            except FileNotFoundError:  # evicted meanwhile
                continue
        lines += [
            SegmentLine(
                shard=index, origin=index, name=path.name, state="quarantined", tier="", rows=0, streams=0,
                nbytes=bytes_on_disk(path), age_seconds=0.0, note=path.name.rsplit("zarr-", 1)[-1],
            )
            for path in quarantined(directory)
        ]  # fmt: skip
    return lines


def stored_in(directory: Path, index: int) -> Iterator[StoredSegment]:
    """The segments of a shard and those it adopted."""
    yield from layout.stored_segments(directory, index)
    for origin, place in layout.adopted_dirs(directory).items():
        yield from layout.stored_segments(place, origin)


def _line(index: int, stored: StoredSegment) -> SegmentLine:
    born, note = 0.0, ""
    sealed = seal.is_sealed(stored.path)
    committed: Any = ()
    try:
        if sealed:
            manifest = seal.read_manifest(stored.path)
            committed, born = manifest.committed, float(manifest.extra.get("born", 0.0))
            streams = len({slot[:2] for slot, n in zip(manifest.slots, committed, strict=True) if n})
        else:
            committed = _words(stored.path / "committed/c/0")
            slots = _words(stored.path / "_slots/c/0/0").reshape(-1, 3)
            streams = len({tuple(slots[i, :2].tolist()) for i in np.flatnonzero(committed)})
            born = (stored.path / "zarr.json").stat().st_mtime
    except (IntegrityError, ValueError, IndexError) as error:
        streams, note = 0, str(error)
    return SegmentLine(
        shard=index,
        origin=stored.origin,
        name=stored.path.name,
        state="sealed" if sealed else "growing",
        tier=stored.tier,
        rows=int(sum(committed)),
        streams=streams,
        nbytes=bytes_on_disk(stored.path),
        age_seconds=max(0.0, time.time() - born) if born else 0.0,
        note=note,
    )


def _words(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), "<i8")


# ---- verify ---------------------------------------------------------------------------------------


def verify_replay(root: Path) -> tuple[int, list[Finding]]:
    """Read every byte under `root`; return the rows whose checks hold, and everything that is wrong.

    Beside a living owner, what it evicts meanwhile is passed over.
    """
    found: list[Finding] = []
    try:
        tables = layout.read_history(root).tables
    except (IntegrityError, SchemaError) as error:
        found.append(Finding(where="table.json", reason="table", what=str(error)))
        carried = layout.carried_history(root)
        tables = carried.tables if carried is not None else ()
    rows = 0
    for index in layout.shard_indices(root):
        directory = layout.shard_dir(root, index)
        found += _verify_small(directory)
        for stored in stored_in(directory, index):
            good, damage = verify_segment(stored, tables)
            rows += good
            where = str(stored.path.relative_to(root))
            found += [Finding(where=where, reason=d.reason, what=d.what) for d in damage]
    return rows, found


def verify_segment(stored: StoredSegment, tables: Sequence[TableSpec]) -> tuple[int, list[seal.Damage]]:
    """Rows of a segment of one of these schemas whose checks hold, and what is wrong. Changes nothing."""
    path = stored.path
    try:
        if seal.is_sealed(path):
            damage = seal.verify(path)
            return (0 if damage else sum(seal.read_manifest(path).committed)), damage
        if not tables:
            return 0, []
        segment = Segment.open(path, *tables)
        good = [segment.good_rows(slot) for slot in range(segment.geometry.slots)]
        short = int(segment.committed.sum()) - sum(good)
        if short:
            return sum(good), [seal.Damage(reason="rows", what=f"{short} rows fail their checks")]
        return sum(good), []
    except FileNotFoundError:
        if path.exists():
            return 0, [seal.Damage(reason="missing", what=f"files of {path} are missing")]
        return 0, []  # evicted meanwhile
    except DreamfleetError as error:
        return 0, [seal.Damage(reason="damaged", what=str(error))]


def _verify_small(directory: Path) -> Iterator[Finding]:
    """The JSON files of a shard."""
    name = directory.name
    try:
        layout.read_json(directory / "shard.json")
    except IntegrityError as error:
        yield Finding(where=f"{name}/shard.json", reason="shard", what=str(error))
    _, wrong = read_ledger(directory)
    for what in wrong:
        yield Finding(where=f"{name}/ledger.json", reason="ledger", what=what)


# ---- repair ---------------------------------------------------------------------------------------


def repair_replay(root: Path) -> Repair:
    """Mend what can be mended; nothing that was whole is touched.

    Raises: PreflightError when a shard has an owner or the disk refuses; IntegrityError when no segment
    carries the schema that a damaged table.json held.
    """
    findings = _mend_table(root)
    history = layout.read_history(root)
    table = history.table
    rows = lost = returned = 0
    for index in layout.shard_indices(root):
        directory = layout.shard_dir(root, index)
        layout.take_lock(directory).close()  # refused while it has an owner
        _, before = verify_replay_shard(directory, index, history.tables)
        findings += before
        back = _bring_back(directory)
        _doubt_everything(directory, index)
        capacity, segment_rows = _geometry(directory, history.tables)
        shard = ReplayShard(root, index, table, capacity_rows=capacity, segment_rows=segment_rows)
        try:
            if not shard.settle(SETTLE_SECONDS):
                raise PreflightError(
                    f"shard {index} took longer than {SETTLE_SECONDS:.0f} s; repair it again"
                )
            stats = shard.stats()
            rows, lost = rows + stats.rows, lost + shard.lost_rows
            returned += sum(
                line.rows for line in take_inventory(root) if line.shard == index and _is_in(line, back)
            )
        finally:
            shard.close()
    return Repair(rows=rows, lost=lost, returned=returned, findings=tuple(findings))


def _is_in(line: SegmentLine, numbers: set[int]) -> bool:
    return line.state != "quarantined" and line.name[:8].isdigit() and int(line.name[:8]) in numbers


def verify_replay_shard(
    directory: Path, index: int, tables: Sequence[TableSpec]
) -> tuple[int, list[Finding]]:
    """As `verify_replay`, for one shard."""
    found, rows = list(_verify_small(directory)), 0
    for stored in stored_in(directory, index):
        good, damage = verify_segment(stored, tables)
        rows += good
        where = f"{directory.name}/{stored.path.name}"
        found += [Finding(where=where, reason=d.reason, what=d.what) for d in damage]
    return rows, found


def _mend_table(root: Path) -> list[Finding]:
    try:
        layout.read_table(root)
    except (IntegrityError, SchemaError) as error:
        carried = layout.carried_history(root)
        if carried is None:
            raise IntegrityError(
                f"{root / 'table.json'} is damaged and no segment carries its schema ({error}); restore it "
                "from a copy, or move the replay away to start an empty one"
            ) from error
        (root / "table.json").unlink(missing_ok=True)
        layout.open_table(root, carried.table)
        return [Finding(where="table.json", reason="table", what="made again from the segments")]
    return []


def _bring_back(directory: Path) -> set[int]:
    """Move quarantined raw segments back whose place is free, to be cut to what holds; their numbers."""
    there = {stored.number for stored in layout.stored_segments(directory)}
    ledger, _ = read_ledger(directory)
    first = ledger.evicted_through + 1 if ledger else 0
    back: set[int] = set()
    for path in quarantined(directory):
        match = QUARANTINED.fullmatch(path.name)
        if match is None or match[2].startswith("schema") or int(match[1][:8]) in there | back:
            continue
        if int(match[1][:8]) < first:
            continue
        final = directory / match[1]
        overlay = path.with_name(f"{layout.overlay_path(final).name}-{match[2]}")
        if overlay.exists():
            overlay.rename(layout.overlay_path(final))
        path.rename(final)
        back.add(int(match[1][:8]))
    return back


def _doubt_everything(directory: Path, index: int) -> None:
    """Have the opening check every row: no manifest of a damaged raw segment, no trust in this boot."""
    for stored in layout.stored_segments(directory, index):
        if stored.tier == "raw" and seal.is_sealed(stored.path) and seal.verify(stored.path):
            seal.manifest_path(stored.path).unlink()
    ledger, _ = read_ledger(directory)
    if ledger is not None:
        ledger.boot = ""
        save_ledger(directory, ledger)


def _geometry(directory: Path, tables: Sequence[TableSpec]) -> tuple[int, int | None]:
    """Capacity and rows of a segment as shard.json has them, or as the segments tell."""
    try:
        about = layout.read_json(directory / "shard.json")
        if about is not None:
            return int(about["capacity_rows"]), int(about["slots"]) * int(about["rows"])
    except (IntegrityError, KeyError, TypeError, ValueError):
        pass
    for path in layout.segment_paths(directory).values():
        try:
            return MUCH, Segment.open(path, *tables).geometry.total
        except (DreamfleetError, FileNotFoundError):
            continue
    return MUCH, None
