"""Pins: hard links that keep the segments a checkpoint names, whatever the shards evict, seal or move later.

<root>/pins/00000007.json   the cut of the 7th pin, its checkpoint, and the entry of every segment
<root>/pins/00000007.undo   overlay rows first overwritten after it (`replay.undo`)
<root>/pins/held/<entry>/   a segment as some cut saw it, and its overlay: links, but for the commit words
                            and checksums of one that grows

Entries are shared by the pins that saw the same rows, so a pin costs what changed since the one before it.
A manifest is written after its entries and removed before them: a kill leaves entries too many, never too
few, and the next sweep takes them away. Used by the learner's process alone; `replay.restore` reads it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from replay import layout, seal
from replay.checks import CHECK
from replay.cut import ATTEMPTS, Cut, SegmentGone, read_committed, segment_key, take_cut
from replay.segment import data_path
from replay.undo import UndoJournal
from system.errors import IntegrityError, PreflightError

log = logging.getLogger(__name__)

PINS, HELD = "pins", "held"
NUMBER = re.compile(r"(\d{8})\.(json|undo)")
DOOMED = ".doomed-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One pin on disk. Made by `pins_of`, taken by PinStore and restore."""

    number: int
    checkpoint: str
    cut: Cut
    entries: Mapping[int, Mapping[str, str]]  # shard -> segment's path inside it -> entry

    @property
    def held(self) -> set[str]:
        return {entry for shard in self.entries.values() for entry in shard.values()}


def pins_of(root: Path) -> list[Pin]:
    """Pins of the table at `root`, oldest first; one that cannot be read is logged and left out."""
    found: list[Pin] = []
    for number, path in _numbered(root / PINS, "json"):
        try:
            value = layout.read_json(path)
            if value is None:
                continue
            entries = {int(shard): dict(names) for shard, names in value["entries"].items()}
            found.append(
                Pin(
                    number=number,
                    checkpoint=str(value["checkpoint"]),
                    cut=Cut.from_json(value["cut"]),
                    entries=entries,
                )
            )
        except (IntegrityError, KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("pin unreadable", extra={"path": str(path), "why": repr(error)})
    return found


def journals_of(root: Path, since: int) -> list[Path]:
    """Undo journals of pin `since` and all later ones, newest first."""
    return [path for number, path in reversed(_numbered(root / PINS, "undo")) if number >= since]


def _numbered(directory: Path, ending: str) -> list[tuple[int, Path]]:
    try:
        found = [(NUMBER.fullmatch(path.name), path) for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((int(m[1]), path) for m, path in found if m and m[2] == ending)


class PinStore:
    """The pins of one table. `take` before a checkpoint is published, `prune` once older ones are gone."""

    def __init__(self, root: Path, *, hold: bool) -> None:
        """With `hold`, cuts are pinned and overlays journaled; without, cuts are only read and pins released.

        Raises: PreflightError when the disk refuses.
        """
        self.root = root
        self._hold = hold
        self._directory = root / PINS
        self._journal: UndoJournal | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="unpin")
        if not hold:
            if self._directory.exists():
                self.prune(())
            return
        layout.make_dir(self._directory / HELD)
        layout.make_dir(self._directory / layout.SCRATCH)
        for left in list((self._directory / layout.SCRATCH).iterdir()):
            self._doom(left)
        for left in list(self._directory.glob(f"{DOOMED}*")):
            self._worker.submit(shutil.rmtree, left, ignore_errors=True)
        self._sweep()
        if begun := journals_of(root, 0):  # rows overwritten before the next pin belong to the newest
            self._journal = UndoJournal(begun[0])

    def take(self, checkpoint: str) -> dict[str, Any] | None:
        """The cut of this instant as a JSON value, held on disk for `checkpoint` until it is pruned.

        Costs directory entries for what changed since the last pin, no data. Overlays are held as they are
        now: no other thread may write to them meanwhile. None when a cut that need not be held cannot be had.
        Raises: PreflightError when the disk refuses, a file is damaged, or the shards evict too fast.
        """
        if not self._hold:
            try:
                return take_cut(self.root).to_json()
            except (PreflightError, IntegrityError) as error:
                log.warning("checkpoint without a cut", extra={"why": str(error)})
                return None
        why = "segments were evicted under it; raise the replay capacity"
        for _ in range(ATTEMPTS):
            try:
                cut = take_cut(self.root)
                entries = self._hold_all(cut)
            except SegmentGone:
                continue
            except IntegrityError as error:  # its owner takes the damaged segment out
                why = str(error)
                continue
            self._publish(checkpoint, cut, entries)
            return cut.to_json()
        raise PreflightError(f"replay at {self.root} could not be pinned in {ATTEMPTS} attempts: {why}")

    def prune(self, checkpoints: Collection[str]) -> None:
        """Release every pin whose checkpoint is not among `checkpoints`; its space returns in the background.

        What the disk refuses to release is logged and tried again by the next call.
        """
        try:
            self._prune(checkpoints)
        except OSError as error:
            log.warning("pins not released", extra={"root": str(self.root), "why": str(error)})

    def _prune(self, checkpoints: Collection[str]) -> None:
        newest = {pin.checkpoint: pin.number for pin in pins_of(self.root)}  # a repeated save pins anew
        kept = {number for checkpoint, number in newest.items() if checkpoint in checkpoints}
        for number, path in _numbered(self._directory, "json"):
            if number not in kept:
                path.unlink(missing_ok=True)
        # What an unpublished pin's journal holds is still needed to undo back to an older pin.
        needed = min(kept, default=None)
        for number, path in _numbered(self._directory, "undo"):
            current = self._journal is not None and path == self._journal.path
            if not current and (needed is None or number < needed):
                path.unlink(missing_ok=True)
        self._sweep()

    def before(self, home: object, first: int, count: int) -> None:
        """Rows of a home's overlay are about to be overwritten. Raises: PreflightError, then don't."""
        if self._journal is not None:
            self._journal.before(home, first, count)

    def close(self) -> None:
        """Finish pending deletions; the pins stay."""
        self._worker.shutdown(wait=True)
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    # ---- inside -----------------------------------------------------------------------------------

    def _hold_all(self, cut: Cut) -> dict[int, dict[str, str]]:
        """Entries of all segments of a cut. Raises: as `_hold_segment`."""
        return {
            shard: {
                name: self._hold_segment(layout.shard_dir(self.root, shard) / name, committed)
                for name, committed in about.segments.items()
            }
            for shard, about in cut.shards.items()
        }

    def _hold_segment(self, segment: Path, committed: tuple[int, ...]) -> str:
        """Make sure that there is an entry for these rows of a segment; return its name.

        Raises: SegmentGone when it was evicted or changed meanwhile; IntegrityError; PreflightError.
        """
        grows = not seal.is_sealed(segment)
        what = f"{segment.name} {grows} {committed}".encode()
        name = f"{segment_key(segment)}-{zlib.crc32(what):08x}"
        entry = self._directory / HELD / name
        if entry.exists():
            return name
        draft = self._directory / layout.SCRATCH / f"{name}-{os.urandom(4).hex()}"
        try:
            draft.mkdir()
            link_segment(segment, draft / segment.name, committed if grows else None)
            for beside in companions(segment):
                link(beside, draft / beside.name)
            if not grows and seal.read_manifest(draft / segment.name).committed != committed:
                raise SegmentGone(segment)  # sealed just now, with rows that the cut does not have
            draft.rename(entry)
        except (FileNotFoundError, SegmentGone) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise SegmentGone(segment) from error
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise PreflightError(
                f"cannot pin {segment} ({error.strerror}); free space, use a filesystem with hard links, or "
                "set replay.resume=keep"
            ) from error
        return name

    def _publish(self, checkpoint: str, cut: Cut, entries: Mapping[int, Mapping[str, str]]) -> None:
        numbers = [n for ending in ("json", "undo") for n, _ in _numbered(self._directory, ending)]
        number = max(numbers, default=0) + 1
        journal = UndoJournal(self._directory / f"{number:08d}.undo")
        if self._journal is not None:
            self._journal.close()
        self._journal = journal
        layout.write_json(
            self._directory / f"{number:08d}.json",
            {
                "format": layout.FORMAT,
                "checkpoint": checkpoint,
                "cut": cut.to_json(),
                "entries": {str(shard): dict(names) for shard, names in entries.items()},
            },
        )

    def _sweep(self) -> None:
        held: set[str] = set()
        for pin in pins_of(self.root):
            held |= pin.held
        place = self._directory / HELD
        for entry in list(place.iterdir()) if place.exists() else ():
            if entry.name not in held:
                self._doom(entry)

    def _doom(self, path: Path) -> None:
        """Out of sight at once, deleted in the background: a half-deleted entry must not look like one."""
        target = self._directory / f"{DOOMED}{os.urandom(4).hex()}"
        path.rename(target)
        self._worker.submit(shutil.rmtree, target, ignore_errors=True)


def companions(segment: Path) -> list[Path]:
    """What lies beside a segment and belongs to it: its overlay, and the kept columns of a far one."""
    return [path for path in (layout.overlay_path(segment), layout.kept_path(segment)) if path.exists()]


def pinned_keys(root: Path) -> frozenset[str]:
    """Segments that some pin holds, by `cut.segment_key`: their objects in a store must stay."""
    return frozenset(entry.rsplit("-", 1)[0] for pin in pins_of(root) for entry in pin.held)


def link_segment(source: Path, target: Path, committed: tuple[int, ...] | None) -> None:
    """Hard-link a segment in any tier. Raises: as `link`.

    One that grows gets commit words and checksums of its own, as if nothing were appended after the cut.
    """
    if committed is None:
        link(source, target)
        return
    words, checks = data_path(Path(), "committed", 1), data_path(Path(), CHECK, 3)
    link(source, target, without=(words, checks, Path(seal.NAME)))
    (target / words).write_bytes(np.asarray(committed, "<i8").tobytes())
    check = np.fromfile(source / checks, "<u4").reshape(len(committed), -1, 2)  # [S, T, 2]
    for slot, rows in enumerate(committed):
        check[slot, rows:] = 0
    check.tofile(target / checks)


def link(source: Path, target: Path, without: Collection[Path] = ()) -> None:
    """Hard-link a directory tree or a file, but the files `without`, paths below it, and temporary ones.

    Raises: FileNotFoundError when it is moved away meanwhile; OSError.
    """
    if not source.is_dir():
        os.link(source, target)
        return
    for directory, files in _walk(source):
        below = directory.relative_to(source)
        (target / below).mkdir()
        for name in files:
            if below / name not in without and not name.startswith("."):
                os.link(directory / name, target / below / name)


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every directory of a tree with the files in it, parents first. Raises: OSError."""
    with os.scandir(top) as found:
        entries = list(found)
    yield top, [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def same_rows(segment: Path, entry: Path, committed: tuple[int, ...]) -> bool:
    """Whether a published segment is what an entry holds: the same rows and the very same overlay files."""
    try:
        if not (entry / segment.name).exists() or read_committed(segment) != committed:
            return False
        overlay = layout.overlay_path(segment)
        held = entry / overlay.name
        if not held.exists():
            return not overlay.exists()
        return all(
            (directory / name).samefile(overlay / directory.relative_to(held) / name)
            for directory, names in _walk(held)
            for name in names
        )
    except (SegmentGone, FileNotFoundError):
        return False
