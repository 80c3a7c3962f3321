"""What an earlier life left in a shard directory: whole segments, cursors, and what was lost.

Sealed segments are believed as their manifest says (`upkeep` verifies them before they are vouched for).
Unsealed ones are checked here: after a death of the process the newest append of every slot, after another
boot of the machine every row, because pages that never reached the disk may be gone or old. Damage costs the
rows behind it, or the segment, never the shard. Between `ledger`, `quarantine` and `log`.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from replay import layout, seal
from replay.admission import MAX_ACTOR, MAX_ENV, Cursor, stream_key
from replay.layout import StoredSegment
from replay.ledger import Ledger, boot_id, read_ledger
from replay.quarantine import quarantine
from replay.seal import Damage, Manifest
from replay.segment import Segment, SegmentFormat
from replay.vouching import last_verified
from system.errors import IntegrityError, SchemaError
from system.experience import StreamId
from system.metrics import Metrics

log = logging.getLogger(__name__)
UNKNOWN = (-1, -1, -1)


@dataclass(slots=True, kw_only=True)
class Entry:
    """A segment as the owner of its shard counts it."""

    stored: StoredSegment
    rows: int
    nbytes: int  # on this disk
    committed: tuple[int, ...]  # [S], as of the seal; empty while it grows
    segment: Segment | None = None  # the owner's map, while it can grow
    sealed: bool = False
    verified: bool = False
    born: float = 0.0  # Unix time of its first row, as far as known

    @property
    def path(self) -> Path:
        return self.stored.path


@dataclass(slots=True, kw_only=True)
class Recovered:
    """Made by `recover`, taken over by `log`."""

    ledger: Ledger
    entries: dict[int, Entry] = field(default_factory=dict[int, Entry])  # own ones, by number, ascending
    adopted: list[Entry] = field(default_factory=list[Entry])
    losses: list[Damage] = field(default_factory=list[Damage])
    unknown_rows: int = 0  # at most so many rows were in segments of which nothing is known


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotEnd:
    """Where a slot's rows end: `good` rows stand, of `claimed` that were acknowledged or may have been."""

    slot: tuple[int, int, int]  # actor, env, position of the first row
    good: int
    claimed: int
    last: tuple[int, int, int, int] | None  # incarnation, episode, step, is_last of the last good row


def recover(directory: Path, index: int, fmt: SegmentFormat, metrics: Metrics | None) -> Recovered:
    """Bring a shard directory into order and say what it holds. Owner only.

    Raises: PreflightError when files cannot be opened or moved.
    """
    layout.sweep(directory)
    known = last_verified(directory)
    ledger, wrong = read_ledger(directory)
    rebuilt = ledger is None and bool(wrong)
    found = Recovered(ledger=ledger or Ledger())
    found.losses += [Damage(reason="ledger", what=what) for what in wrong]
    for what in wrong:
        log.error("replay ledger damaged", extra={"shard": index, "what": what, "rebuilt": rebuilt})
    rescue = _Rescue(directory, index, fmt, metrics, found)
    numbers = rescue.take_segments()
    if rebuilt and found.entries:
        found.ledger.evicted_through = max(found.ledger.evicted_through, min(found.entries) - 1)
    rescue.mark_missing(numbers, known)
    for origin, place in layout.adopted_dirs(directory).items():
        rescue.take_adopted(place, origin)
    found.ledger.epoch += 1
    found.ledger.boot = boot_id()
    return found


class _Rescue:
    """One opening of a shard directory."""

    def __init__(
        self, directory: Path, index: int, fmt: SegmentFormat, metrics: Metrics | None, found: Recovered
    ) -> None:
        self._directory = directory
        self._index = index
        self._format = fmt
        self._metrics = metrics
        self._found = found
        boot = found.ledger.boot
        self._same_boot = boot != "" and boot == boot_id()
        self._newest: dict[int, int] = {}  # by stream key: number of the segment with its newest rows
        self._unreadable: list[int] = []  # numbers of segments of which not all streams are known
        self._strangers: set[int] = set()  # numbers of segments of other replays

    def take_segments(self) -> list[int]:
        """Take over the shard's own segments; return all numbers there were."""
        ledger = self._found.ledger
        chosen = _choose(self._directory, layout.stored_segments(self._directory, self._index))
        for number, stored in chosen.items():
            if number <= ledger.evicted_through:
                layout.remove(layout.discard(self._directory, stored.path))
                continue
            entry, ends = self._take(stored, self._directory)
            if entry is not None and entry.rows:
                self._found.entries[number] = entry
            elif entry is not None:  # nothing was ever committed to it
                layout.remove(layout.discard(self._directory, entry.path))
            elif not ends and number not in self._strangers:
                self._unreadable.append(number)
            for end in ends:
                if end.good:
                    self._move_cursor(number, end)
            if any(end.claimed and not end.good for end in ends):  # whose rows they were is not proven
                self._unreadable.append(number)
        return [number for number in chosen if number not in self._strangers]

    def take_adopted(self, place: Path, origin: int) -> None:
        """Segments of another shard's rows: they have no part in this shard's cursors."""
        layout.sweep(place)
        for stored in _choose(place, layout.stored_segments(place, origin)).values():
            entry, _ = self._take(stored, place)
            if entry is not None and entry.rows:
                self._found.adopted.append(entry)

    def mark_missing(self, numbers: list[int], known: Iterable[str]) -> None:
        """Let streams that may have had rows in vanished segments go on: their cursors become torn."""
        ledger = self._found.ledger
        listed = {int(match[1]) for name in known if (match := layout.SEGMENT_NAME.fullmatch(name))}
        top = max([*numbers, *listed], default=-1)
        missing = set(range(ledger.evicted_through + 1, top + 1)) - set(numbers)
        for number in sorted(missing):
            self._lose("missing", f"segment {number} of {self._directory} is gone")
        gone = sorted(missing | set(self._unreadable))
        self._found.unknown_rows = len(gone) * self._format.geometry.total
        ledger.forgotten += self._found.unknown_rows
        for key, cursor in ledger.cursors.items():
            later = sum(number > self._newest.get(key, -1) for number in gone)
            if later:
                skip = later * self._format.geometry.total
                ledger.skipped += skip
                ledger.cursors[key] = _torn(cursor, cursor.position + skip)

    # ---- one segment ------------------------------------------------------------------------------

    def _take(self, stored: StoredSegment, place: Path) -> tuple[Entry | None, list[SlotEnd]]:
        """The entry of a segment, None when it went into quarantine; and the ends of its slots."""
        try:
            if seal.is_sealed(stored.path):
                try:
                    return self._take_sealed(stored, place)
                except IntegrityError as error:
                    if stored.tier != "raw":
                        raise
                    self._lose("manifest", str(error))
                    seal.manifest_path(stored.path).unlink()
            return self._take_unsealed(stored, place)
        except SchemaError as error:
            self._strangers.add(stored.number)
            damage = Damage(reason="schema", what=str(error))
        except (IntegrityError, FileNotFoundError) as error:
            damage = Damage(reason=_reason(error), what=str(error))
        quarantine(place, stored.path, damage.reason, damage.what, self._metrics)
        self._found.losses.append(damage)
        return None, []

    def _take_sealed(self, stored: StoredSegment, place: Path) -> tuple[Entry | None, list[SlotEnd]]:
        manifest = seal.read_manifest(stored.path)
        self._require_ours(stored, manifest.schema, manifest.replay)
        if manifest.name != stored.stem:
            raise IntegrityError(f"{stored.path} holds segment {manifest.name}; it was renamed")
        if damage := seal.verify(stored.path, contents=False):
            quarantine(place, stored.path, damage[0].reason, damage[0].what, self._metrics)
            self._found.losses += damage
            return None, slot_ends(manifest)
        nbytes = bytes_on_disk(stored.path)
        entry = Entry(
            stored=stored, rows=sum(manifest.committed), nbytes=nbytes, committed=manifest.committed,
            sealed=True, born=float(manifest.extra.get("born", 0.0)),
        )  # fmt: skip
        return entry, slot_ends(manifest)

    def _take_unsealed(self, stored: StoredSegment, place: Path) -> tuple[Entry, list[SlotEnd]]:
        segment = Segment.open(stored.path, *self._format.tables, writable=True)
        self._require_ours(stored, segment.table.digest, segment.replay)
        if segment.number != stored.number:
            raise IntegrityError(f"{stored.path} says it is segment {segment.number}; it was renamed")
        ends = [_slot_end(segment, slot, self._same_boot) for slot in range(segment.geometry.slots)]
        born = (stored.path / "zarr.json").stat().st_mtime
        if any(end.claimed > end.good for end in ends):
            lost = sum(end.claimed - end.good for end in ends)
            self._lose("rows", f"{stored.path}: {lost} rows fail their checks and are cut off")
            if any(end.good for end in ends):
                stored, segment = self._cut_back(stored, place, [end.good for end in ends])
            else:
                quarantine(place, stored.path, "rows", "no row holds", self._metrics)
        else:
            for slot, end in enumerate(ends):  # complete rows whose commit word never came
                segment.committed[slot] = end.good
        rows = sum(end.good for end in ends)
        ours = segment.table.digest == self._format.table.digest
        nbytes = self._format.nbytes if ours else bytes_on_disk(stored.path)
        entry = Entry(
            stored=stored, rows=rows, nbytes=nbytes, committed=(), segment=segment, born=born
        )  # fmt: skip
        return entry, [end for end in ends if end.claimed]

    def _require_ours(self, stored: StoredSegment, schema: str, replay: str) -> None:
        known = [table.digest for table in self._format.tables]
        if schema not in known:
            raise SchemaError(f"{stored.path} has schema {schema[:12]}, its table {known[0][:12]}")
        if replay != self._format.replay_id:
            raise SchemaError(
                f"{stored.path} belongs to replay {replay or 'unknown'}, not to {self._format.replay_id}; "
                "it was moved here: bring it in with `dreamfleet replay import`"
            )

    def _cut_back(self, stored: StoredSegment, place: Path, good: list[int]) -> tuple[StoredSegment, Segment]:
        """Publish the good rows of a damaged segment under a name of this life; keep the damaged one aside.

        All files but the commit words are shared with it, so this takes no space.
        """
        name = layout.segment_name(stored.number, self._found.ledger.epoch + 1)
        draft = place / layout.SCRATCH / name
        for source, target in (
            (stored.path, draft),
            (layout.overlay_path(stored.path), layout.overlay_path(draft)),
        ):
            if source.exists():
                shutil.copytree(source, target, copy_function=os.link)
        words = draft / "committed/c/0"
        words.unlink()
        words.write_bytes(np.asarray(good, "<i8").tobytes())
        quarantine(place, stored.path, "rows", "cut back to its good rows", self._metrics)
        segment = Segment.open(draft, *self._format.tables, writable=True)
        segment.publish(place)
        entry = layout.StoredSegment(
            path=segment.path, number=stored.number, epoch=self._found.ledger.epoch + 1, tier="raw",
            origin=stored.origin,
        )  # fmt: skip
        return entry, segment

    def _lose(self, reason: str, what: str) -> None:
        self._found.losses.append(Damage(reason=reason, what=what))
        log.error("replay rows lost", extra={"reason": reason, "what": what})

    # ---- cursors ----------------------------------------------------------------------------------

    def _move_cursor(self, number: int, end: SlotEnd) -> None:
        actor, env, start = end.slot
        key = stream_key(StreamId(actor=actor, env=env))
        cursors = self._found.ledger.cursors
        self._newest[key] = max(number, self._newest.get(key, -1))
        known = cursors.get(key)
        stop = start + end.claimed
        if known is not None and stop <= known.position:
            return
        assert end.last is not None, end
        incarnation, episode, step, is_last = end.last
        cursors[key] = Cursor(
            position=stop, incarnation=incarnation, episode=episode, step=step, is_last=bool(is_last),
            torn=end.claimed > end.good,
        )  # fmt: skip


def _slot_end(segment: Segment, slot: int, same_boot: bool) -> SlotEnd:
    """What of a slot stands. A commit word that was lost is no loss: the checksums tell whole appends."""
    actor, env, start = segment.slots[slot].tolist()
    rows, word = segment.geometry.rows, int(segment.committed[slot])
    ends = np.flatnonzero(segment.check[slot, :, 1])
    if (actor, env, start) == UNKNOWN and word == 0 and not len(ends):
        return SlotEnd(slot=UNKNOWN, good=0, claimed=0, last=None)
    claimed = word if 0 <= word <= rows else (int(ends[-1]) + 1 if len(ends) else 0)
    if not (0 <= actor < MAX_ACTOR and 0 <= env < MAX_ENV and 0 <= start < 1 << 62):
        return SlotEnd(slot=UNKNOWN, good=0, claimed=claimed, last=None)
    complete = same_boot and word == (int(ends[-1]) + 1 if len(ends) else 0)
    good = word if complete and (word == 0 or segment.append_holds(slot, word)) else None
    if good is None:
        good = segment.good_rows(slot, rows)
    columns = segment.slot_columns(slot)
    return SlotEnd(
        slot=(actor, env, start),
        good=good,
        claimed=max(claimed, good),
        last=last_row(columns, good) if good else None,
    )


def last_row(columns: dict[str, np.ndarray], rows: int) -> tuple[int, int, int, int]:
    """Incarnation, episode, step and is_last of the last of `rows` rows of a slot."""
    incarnation, episode, step, is_last = (
        int(columns[name][rows - 1]) for name in ("incarnation", "episode", "step", "is_last")
    )
    return incarnation, episode, step, is_last


def slot_ends(manifest: Manifest) -> list[SlotEnd]:
    """The ends of all used slots of a sealed segment."""
    return [
        SlotEnd(slot=slot, good=good, claimed=good, last=last)
        for slot, good, last in zip(manifest.slots, manifest.committed, manifest.last, strict=True)
        if good
    ]


def describe(stored: StoredSegment, segment: Segment, born: float) -> Manifest:
    """The manifest of a raw segment that no longer grows, without its files."""
    committed = tuple(segment.committed.tolist())
    return Manifest(
        name=stored.stem,
        tier="raw",
        schema=segment.table.digest,
        replay=segment.replay,
        origin=stored.origin,
        number=stored.number,
        epoch=stored.epoch,
        rows=segment.geometry.rows,
        committed=committed,
        slots=tuple((a, e, s) for a, e, s in segment.slots.tolist()),
        last=tuple(
            last_row(segment.slot_columns(slot), used) if used else (-1, -1, -1, 0)
            for slot, used in enumerate(committed)
        ),
        files={},
        extra={"born": born, "sealed": time.time()},
    )


def bytes_on_disk(path: Path) -> int:
    """Blocks that a segment and its overlay take here."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    files += [p for p in layout.overlay_path(path).rglob("*") if p.is_file()]
    return sum(file.stat().st_blocks * 512 for file in files)


def _choose(directory: Path, found: list[StoredSegment]) -> dict[int, StoredSegment]:
    """One form of each segment: of the newest epoch, in the most local tier. The others are discarded."""
    chosen: dict[int, StoredSegment] = {}
    for stored in found:
        before = chosen.get(stored.number)
        if before is None:
            chosen[stored.number] = stored
        elif before.epoch == stored.epoch:
            layout.remove(layout.discard(directory, stored.path, overlay=False))
        else:
            layout.remove(layout.discard(directory, before.path))
            chosen[stored.number] = stored
    return chosen


def _torn(cursor: Cursor, position: int) -> Cursor:
    return Cursor(
        position=position, incarnation=cursor.incarnation, episode=cursor.episode, step=cursor.step,
        is_last=cursor.is_last, torn=True,
    )  # fmt: skip


def _reason(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) or "missing" in str(error) else "damaged"
