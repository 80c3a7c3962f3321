"""Brings a table back to the cut of a checkpoint: exact resume. No shard may be open meanwhile.

Every step leaves a replay that shards can open, and all of them may be repeated: after a crash in the middle
the restore is simply run again. Pinned files stay untouched, except that overlays get their old rows back.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replay import layout, seal
from replay.cut import Cut, ShardCut, published, read_ledger, segment_key, take_cut
from replay.ledger import write_ledger
from replay.pins import HELD, PINS, Pin, companions, journals_of, link, link_segment, pins_of, same_rows
from replay.undo import undo
from system.errors import IntegrityError, PreflightError

log = logging.getLogger(__name__)
TRASH = ".trash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore did. Made by `restore_exact`, taken by the session's report."""

    rows: int  # live at the cut
    removed: int  # rows inserted after it
    returned: int  # segments that were evicted or replaced since and came back
    undone: int  # overlay rows put back


def restore_exact(root: Path, checkpoint: str, cut: Cut) -> Restored:
    """Make the table at `root` hold exactly what it held at `cut`, which `checkpoint` pinned.

    Raises: IntegrityError when the pins are missing, naming the remedy; PreflightError when a shard is open
    or the disk refuses. The table is unchanged by the first, and can be restored again after the second.
    """
    pin = _find(root, checkpoint, cut)
    before = take_cut(root).inserted
    with ExitStack() as locks:
        for index in layout.shard_indices(root):
            locks.enter_context(layout.take_lock(layout.shard_dir(root, index)))
        try:
            returned = _restore(root, pin)
            overlays = {
                entry.rsplit("-", 1)[0]: overlay
                for entry in pin.held
                for overlay in (root / PINS / HELD / entry).glob("*.overlay.zarr")
            }
            undone = undo(journals_of(root, pin.number), overlays)
            _forget_later(root, pin.number)
        except OSError as error:
            raise PreflightError(
                f"cannot restore the replay at {root} ({error.strerror}: {error.filename}); free space or "
                "mend its permissions and start again"
            ) from error
    removed = max(0, before - cut.inserted)
    report = Restored(rows=cut.rows, removed=removed, returned=returned, undone=undone)
    log.info("replay restored", extra={"checkpoint": checkpoint, "rows": cut.rows, "removed": removed})
    return report


def empty_trash(root: Path) -> None:
    """Delete what restores took out. Slow on purpose: call it from a thread that nobody waits for."""
    shutil.rmtree(root / TRASH, ignore_errors=True)


def _find(root: Path, checkpoint: str, cut: Cut) -> Pin:
    remedy = "resume with --set replay.resume=keep to use all rows, or fresh to collect anew"
    found = [pin for pin in pins_of(root) if pin.checkpoint == checkpoint and pin.cut == cut]
    if not found:
        raise IntegrityError(
            f"checkpoint {checkpoint} has no pinned replay under {root / PINS}: it was saved without "
            f"replay.resume=exact, or its pins were removed; {remedy}"
        )
    pin = found[-1]
    wanted = {shard: set(about.segments) for shard, about in cut.shards.items()}
    if {shard: set(names) for shard, names in pin.entries.items()} != wanted:
        raise IntegrityError(f"pin {pin.number} under {root / PINS} does not match its cut; {remedy}")
    missing = sorted(entry for entry in pin.held if not (root / PINS / HELD / entry).exists())
    if missing:
        raise IntegrityError(
            f"pin of checkpoint {checkpoint} lacks {len(missing)} of {len(pin.held)} segments "
            f"({missing[0]} ...) under {root / PINS / HELD}; {remedy}"
        )
    return pin


def _restore(root: Path, pin: Pin) -> int:
    returned = 0
    for index in sorted({*layout.shard_indices(root), *pin.cut.shards}):
        directory = layout.shard_dir(root, index)
        shard = pin.cut.shards.get(index, ShardCut(ledger={}, segments={}))
        layout.make_dir(directory / layout.SCRATCH)
        # The ledger first: without it, returned segments would count as evicted when a shard opens. Nobody
        # may miss those that go.
        (directory / layout.VERIFIED).unlink(missing_ok=True)
        _write_ledger(directory, shard.ledger)
        entries = pin.entries.get(index, {})
        there = dict(published(directory))  # in the tier that counts
        for name, committed in shard.segments.items():
            segment, entry = directory / name, root / PINS / HELD / entries[name]
            if name not in there or not same_rows(segment, entry, committed):
                _bring_back(root, directory, segment, entry, committed)
                returned += 1
        _remove_others(root, directory, shard)
    return returned


def _write_ledger(directory: Path, ledger: Mapping[str, Any]) -> None:
    """The ledger of the cut, but never an epoch that was used since: it fences off who wrote then."""
    now = read_ledger(directory)
    epoch = max(int(now.get("epoch", 0)), int(ledger.get("epoch", 0)))
    if ledger or now:
        write_ledger(directory, {**(ledger or now), "epoch": epoch})


def _bring_back(root: Path, directory: Path, segment: Path, entry: Path, committed: tuple[int, ...]) -> None:
    """Publish the pinned state of a segment in the place of whatever is there in any tier."""
    draft = directory / layout.SCRATCH / f"restored-{os.urandom(4).hex()}"
    draft.mkdir(parents=True)
    grows = not seal.is_sealed(entry / segment.name)
    link_segment(entry / segment.name, draft / segment.name, committed if grows else None)
    beside = companions(entry / segment.name)
    for path in beside:
        link(path, draft / path.name)
    segment.parent.mkdir(exist_ok=True)
    _trash_segment(root, segment)
    for path in beside:
        (draft / path.name).rename(segment.parent / path.name)
    (draft / segment.name).rename(segment)
    draft.rmdir()


def _remove_others(root: Path, directory: Path, shard: ShardCut) -> None:
    """Take out what was published after the cut."""
    for name, segment in list(published(directory)):
        if name not in shard.segments:
            _trash_segment(root, segment.path)


def _trash_segment(root: Path, segment: Path) -> None:
    """Take a segment out in all its tiers, with what belongs to it; deleted later, by `empty_trash`."""
    trash = root / TRASH
    trash.mkdir(exist_ok=True)
    tiers = [layout.tier_path(segment, tier) for tier in layout.SUFFIXES]
    for path in (*tiers, *companions(segment)):
        if path.exists():
            path.rename(trash / f"{segment_key(segment)}-{os.urandom(4).hex()}")


def _forget_later(root: Path, number: int) -> None:
    """Pins made after the one restored name rows that no longer exist."""
    for path in (root / PINS).iterdir():
        if path.suffix in (".json", ".undo") and path.stem.isdigit() and int(path.stem) > number:
            path.unlink()
