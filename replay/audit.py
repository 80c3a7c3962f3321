"""Balances the books of a replay from its files alone: every row stored once, none missing, none torn.

Reads all committed rows of all segments, alive or not, beside a shard that goes on appending. Knows nothing
of those who sent the rows: `deploy.audit` sets these books against what the actors say was acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.admission import check_chunk, stream_of
from replay.catalog import Catalog
from replay.segment import Segment
from system.errors import DeadlineError, IntegrityError, RejectedError, SchemaError
from system.experience import Chunk, StreamId
from system.specs import TableSpec

ATTEMPTS = 20
"""Readings of a shard before giving up because it evicts faster than it can be read."""
IDENTITY = ("incarnation", "episode", "step")
FLAGS = ("is_first", "is_last")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One entry that does not balance. Made by `audit_replay` and `deploy.audit`."""

    kind: str  # missing | doubled | torn | order | version | ledger | damaged | lost
    where: str
    what: str
    rows: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayBooks:
    """What a replay holds. Made by `audit_replay`."""

    shards: int
    segments: int
    inserted: int  # rows ever committed
    live: int  # rows read
    evicted: int
    rows: Mapping[tuple[StreamId, int], int]  # live, by stream and incarnation
    positions: Mapping[StreamId, int]  # rows ever committed, by stream
    whole_from: Mapping[StreamId, int]  # the first incarnation of which nothing was evicted
    findings: tuple[Finding, ...]

    def rows_of(self, kind: str) -> int:
        """Rows that findings of this kind are about."""
        return sum(finding.rows for finding in self.findings if finding.kind == kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The committed rows of one slot: `count` rows of a stream from `position` on."""

    segment: Segment
    slot: int
    position: int
    count: int

    def column(self, name: str) -> NDArray[Any]:
        array = self.segment.columns.get(name)
        array = self.segment.overlay[name] if array is None else array
        return array[self.slot, : self.count]  # [T, ...]


@dataclass(slots=True, kw_only=True)
class _Shard:
    """One reading of a shard directory."""

    name: str
    runs: dict[StreamId, list[_Run]]  # by stream, ascending position
    cursors: dict[StreamId, int]  # as of the ledger
    segments: int
    evicted: int
    skipped: int  # positions left out: streams went on behind rows that another shard has
    inserted: int  # the catalog's word, read before the rows
    findings: list[Finding]


def audit_replay(root: Path) -> ReplayBooks:
    """Read every committed row and balance it. Faults of the rows become findings.

    Raises: SchemaError, IntegrityError when there is no readable table; DeadlineError when a shard evicts
    faster than it can be read.
    """
    tables = layout.read_history(root).tables
    findings: list[Finding] = []
    rows: dict[tuple[StreamId, int], int] = {}
    positions: dict[StreamId, int] = {}
    whole_from: dict[StreamId, int] = {}
    homes: dict[StreamId, list[tuple[str, NDArray[np.int64]]]] = {}  # shard, identities [T, 3]
    segments = inserted = live = evicted = 0
    indices = layout.shard_indices(root)
    for index in indices:
        shard = _read_shard(layout.shard_dir(root, index), tables)
        findings += shard.findings
        segments += shard.segments
        counted = lowest = 0
        for stream in sorted(shard.runs.keys() | shard.cursors.keys()):
            runs = shard.runs.get(stream, [])
            homes.setdefault(stream, []).append((shard.name, _identities(runs)))
            top = max([shard.cursors.get(stream, 0), *(run.position + run.count for run in runs)])
            positions[stream] = positions.get(stream, 0) + top
            counted += top
            lowest += runs[0].position if runs else top
            live += sum(run.count for run in runs)
            findings += _check_positions(shard, stream, runs)
            if runs and (short := top - runs[-1].position - runs[-1].count):
                what = f"the ledger knows {top} rows, the newest here is {top - short - 1}"
                findings.append(_finding("missing", shard.name, stream, what, short))
            whole_from[stream] = max(whole_from.get(stream, 0), _whole_from(runs, top))
            findings += _check_stream(shard.name, stream, runs, rows)
        inserted += counted
        evicted += shard.evicted
        findings += _check_ledger(shard, counted, lowest)
    for stream, parts in homes.items():
        findings += _check_homes(stream, parts)
    return ReplayBooks(
        shards=len(indices),
        segments=segments,
        inserted=inserted,
        live=live,
        evicted=evicted,
        rows=rows,
        positions=positions,
        whole_from=whole_from,
        findings=tuple(findings),
    )


def _finding(kind: str, shard: str, stream: StreamId | None, what: str, rows: int = 1) -> Finding:
    return Finding(kind=kind, where=shard if stream is None else f"{shard} {stream}", what=what, rows=rows)


# ---- reading a shard that may be alive ------------------------------------------------------------


def _read_shard(directory: Path, tables: Sequence[TableSpec]) -> _Shard:
    for _ in range(ATTEMPTS):
        before = _ledger(directory)
        try:
            inserted = Catalog(directory, writable=False)["inserted"]
        except FileNotFoundError:
            inserted = 0
        opened = _open_segments(directory, tables, int(before.get("evicted_through", -1)))
        if opened is None or _ledger(directory).get("evicted_through") != before.get("evicted_through"):
            continue  # something was evicted meanwhile: these books would not balance
        segments, findings = opened
        cursors = {
            stream_of(int(key)): int(position) for key, position, *_ in before.get("cursors", {}).values()
        }
        return _Shard(
            name=directory.name,
            runs=_runs(segments),
            cursors=cursors,
            segments=len(segments),
            evicted=int(before.get("evicted_rows", 0)),
            skipped=int(before.get("skipped", 0)),
            inserted=inserted,
            findings=findings,
        )
    raise DeadlineError(
        f"{directory} evicted segments during each of {ATTEMPTS} readings; audit it while actors rest"
    )


def _ledger(directory: Path) -> dict[str, Any]:
    return layout.read_json(directory / "ledger.json") or {}


def _open_segments(
    directory: Path, tables: Sequence[TableSpec], evicted_through: int
) -> tuple[list[Segment], list[Finding]] | None:
    """Segments that are not evicted, oldest first, and those that cannot be read; None when one vanished."""
    segments: list[Segment] = []
    findings: list[Finding] = []
    for number, path in layout.segment_paths(directory).items():
        if number <= evicted_through:
            continue  # its eviction was interrupted; the owner finishes it when it reopens
        try:
            segments.append(Segment.open(path, *tables))
        except FileNotFoundError:
            return None
        except (IntegrityError, SchemaError) as error:
            findings.append(Finding(kind="damaged", where=f"{directory.name}/{path.name}", what=str(error)))
    return segments, findings


def _runs(segments: list[Segment]) -> dict[StreamId, list[_Run]]:
    """Committed rows by stream. Newest slots first: an older one can only have grown since."""
    runs: dict[StreamId, list[_Run]] = {}
    for segment in reversed(segments):
        for slot in reversed(range(segment.geometry.slots)):
            count = int(segment.committed[slot])
            if count:
                actor, env, start = segment.slots[slot].tolist()
                run = _Run(segment=segment, slot=slot, position=start, count=count)
                runs.setdefault(StreamId(actor=actor, env=env), []).append(run)
    for found in runs.values():
        found.sort(key=lambda run: run.position)
    return runs


# ---- balancing --------------------------------------------------------------------------------------


def _check_ledger(shard: _Shard, counted: int, lowest: int) -> Iterator[Finding]:
    if counted < shard.inserted:
        short = shard.inserted - counted
        what = f"the catalog says {shard.inserted} rows were inserted, the streams have had {counted}"
        yield _finding("missing", shard.name, None, what, short)
    if not shard.evicted <= lowest <= shard.evicted + shard.skipped:
        what = f"the ledger says {shard.evicted} rows were evicted, the streams begin behind {lowest}"
        yield _finding("ledger", shard.name, None, what, abs(lowest - shard.evicted))


def _check_positions(shard: _Shard, stream: StreamId, runs: list[_Run]) -> Iterator[Finding]:
    """The live rows of a stream are one range of positions, without gaps but those the shard left."""
    for run, following in pairwise(runs):
        gap = following.position - (run.position + run.count)
        if gap == 1 and shard.skipped:
            continue
        if gap:
            what = f"positions {run.position + run.count} and {following.position} do not meet"
            yield _finding("missing" if gap > 0 else "doubled", shard.name, stream, what, abs(gap))


def _identities(runs: list[_Run]) -> NDArray[np.int64]:
    """(incarnation, episode, step) of every row [T, 3]."""
    columns = [np.concatenate([run.column(name) for run in runs] or [[]]) for name in IDENTITY]
    return np.stack(columns, axis=1).astype(np.int64)


def _check_homes(stream: StreamId, parts: list[tuple[str, NDArray[np.int64]]]) -> Iterator[Finding]:
    """An actor may have moved, but no row is stored at two shards."""
    if len(parts) < 2:
        return
    every = np.concatenate([rows for _, rows in parts])
    within = sum(len(np.unique(rows, axis=0)) for _, rows in parts)
    doubled = within - len(np.unique(every, axis=0))
    if doubled:
        places = " and ".join(name for name, _ in parts)
        yield _finding("doubled", places, stream, f"{doubled} rows are stored at both", doubled)


def _check_stream(
    shard: str,
    stream: StreamId,
    runs: list[_Run],
    counts: dict[tuple[StreamId, int], int],
) -> list[Finding]:
    """Identities, versions and contents of all live rows of one stream; counts its lives into `counts`."""
    if not runs:
        return []
    names = (*IDENTITY, *FLAGS, "policy_version")
    rows = {name: np.concatenate([run.column(name) for run in runs]) for name in names}  # each [T]
    gaps = [run.position + run.count < following.position for run, following in pairwise(runs)]
    ends = np.cumsum([run.count for run in runs])
    behind = ends[:-1][np.asarray(gaps, np.bool_)]  # rows behind a gap, which has a finding of its own
    findings = [
        _finding(kind, shard, stream, what, count) for kind, what, count in _check_identities(rows, behind)
    ]
    back = np.flatnonzero(np.diff(rows["policy_version"]) < 0)
    if len(back):
        what = f"policy_version goes back at {_name(rows, int(back[0]) + 1)}"
        findings.append(_finding("version", shard, stream, what, len(back)))
    lives, sizes = np.unique(rows["incarnation"], return_counts=True)
    for life, size in zip(lives.tolist(), sizes.tolist(), strict=True):
        counts[stream, life] = counts.get((stream, life), 0) + size
    for run in runs:
        findings += _check_contents(shard, stream, run)
    return findings


def _whole_from(runs: list[_Run], top: int) -> int:
    """See ReplayBooks. An incarnation whose first row is gone does not begin at episode 0 step 0."""
    if not top or (runs and runs[0].position == 0):
        return 0
    if not runs:
        return 1 << 31
    incarnation, episode, step = (int(runs[0].column(name)[0]) for name in IDENTITY)
    return incarnation if episode == 0 and step == 0 else incarnation + 1


def _follows(rows: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether row t + 1 is a legal successor of row t [T - 1]."""
    incarnation, episode, step = (rows[name].astype(np.int64) for name in IDENTITY)
    same = incarnation[1:] == incarnation[:-1]
    ended = rows["is_last"][:-1]
    going_on = same & ~ended & (episode[1:] == episode[:-1]) & (step[1:] == step[:-1] + 1)
    following = same & ended & (episode[1:] == episode[:-1] + 1) & (step[1:] == 0)
    reborn = (incarnation[1:] > incarnation[:-1]) & (step[1:] == 0)
    return going_on | following | reborn


def _check_identities(
    rows: Mapping[str, NDArray[Any]], behind: NDArray[np.int64]
) -> Iterator[tuple[str, str, int]]:
    """(kind, what, rows) for each place where the identities of a stream do not follow each other.

    Rows `behind` a gap of positions must only be later ones than those before it.
    """
    identity = np.stack([rows[name].astype(np.int64) for name in IDENTITY], axis=1)  # [T, 3]
    doubled = len(identity) - len(np.unique(identity, axis=0))
    if doubled:
        yield "doubled", f"{doubled} of {len(identity)} identities are stored more than once", doubled
    for row in np.flatnonzero(~_follows(rows)).tolist():
        before, after = tuple(identity[row].tolist()), tuple(identity[row + 1].tolist())
        if row + 1 in behind and after > before:
            continue
        what = f"{_name(rows, row)} is followed by {_name(rows, row + 1)}"
        if after > before and after[0] == before[0]:
            skipped = after[2] - before[2] - 1 if after[1] == before[1] else 1
            yield "missing", what, max(1, skipped)
        elif after != before:
            yield "order", what, 1


def _name(rows: Mapping[str, NDArray[Any]], row: int) -> str:
    return "incarnation {} episode {} step {}".format(*(int(rows[name][row]) for name in IDENTITY))


def _check_contents(shard: str, stream: StreamId, run: _Run) -> Iterator[Finding]:
    """The stored rows would be admitted again: dtypes, ranges, finite values, flags."""
    table = run.segment.table
    rows = {name: run.column(name) for name in (*IDENTITY, *FLAGS)}
    same = rows["incarnation"][1:] == rows["incarnation"][:-1]
    cuts = np.flatnonzero(~(_follows(rows) & same)) + 1  # other faults of order have their own findings
    bounds = [0, *cuts.tolist(), run.count]
    for begin, end in pairwise(bounds):
        columns = {name: run.column(name)[begin:end] for name in table.all}
        try:
            check_chunk(table, Chunk(stream=stream, columns=columns))
        except RejectedError as error:
            where = f"{run.segment.path.name} slot {run.slot} rows {begin}..{end - 1}"
            yield _finding("torn", shard, stream, f"{where}: {error}", end - begin)
