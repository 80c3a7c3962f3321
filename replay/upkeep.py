"""The quiet work of a shard: verify what an earlier life left, seal what no longer grows, scrub, age, flush.

One thread takes one job at a time and works outside the shard's lock; only what it found is entered under it.
Then come the *stages* over sealed segments (compression, shipping: `replay.tiers`), the most urgent first.
Between `log`, which says what is there, and `seal`, `checks`, which know the checksums.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from replay import layout, seal
from replay.holes import release_unused
from replay.layout import StoredSegment
from replay.log import SegmentLog
from replay.quarantine import damage_reports
from replay.recovery import Entry, bytes_on_disk, describe
from replay.seal import Damage
from replay.segment import Segment
from system.errors import DreamfleetError, IntegrityError, PreflightError

log = logging.getLogger(__name__)

Durability = Literal["process", "interval", "flush"]
TICK_SECONDS = 0.5
RETRY_SECONDS = 30.0
"""A stage that failed is left alone for so long."""
STOP_SECONDS = 60.0


class Stage(Protocol):
    """Work over sealed segments. One background thread of the shard calls it, outside the shard's lock."""

    name: str

    def pick(self, sealed: Sequence[StoredSegment]) -> StoredSegment | None:
        """The segment to work on next, None when there is nothing to do. `sealed` has the oldest first."""
        ...

    def work(self, segment: StoredSegment, scratch: Path) -> tuple[Path, layout.Tier] | None:
        """Make another form of the segment, complete, in `scratch`; the shard publishes it in its place.

        None when the segment stays as it is. Raises: a DreamfleetError, then it is tried again later.
        """
        ...


class Upkeep:
    """The background thread of one shard. `lock` guards `segments`, the shard's log."""

    def __init__(
        self,
        segments: SegmentLog,
        lock: threading.Condition,
        *,
        stages: Sequence[Stage] = (),
        max_age_seconds: float | None = None,
        scrub_seconds: float = 0.0,
        durability: Durability = "process",
        flush_seconds: float = 10.0,
    ) -> None:
        """Start. `scrub_seconds` 0 verifies only what an earlier life left."""
        self._log = segments
        self._lock = lock
        self._stages = stages
        self._max_age = max_age_seconds
        self._scrub_seconds = scrub_seconds
        self._durable = durability != "process"
        self._idle = threading.Event()  # set when nothing was left to do
        self._work = threading.Event()
        self._stop = threading.Event()
        self._not_before: dict[str, float] = {}  # by stage name, monotonic
        self._scrub_queue: list[Entry] = []
        self._next_scrub = time.monotonic() + scrub_seconds
        self._vouched: object = None
        self._threads = [threading.Thread(target=self._run, name="replay-upkeep", daemon=True)]
        if durability == "interval":
            flush = threading.Thread(
                target=self._flush_every, args=(flush_seconds,), name="replay-flush", daemon=True
            )
            self._threads.append(flush)
        for thread in self._threads:
            thread.start()

    def nudge(self) -> None:
        """There may be work: look now."""
        self._idle.clear()
        self._work.set()

    def settle(self, timeout: float) -> bool:
        """Wait until everything is verified, sealed and staged; False when that took longer."""
        self.nudge()
        return self._idle.wait(timeout)

    def stop(self) -> None:
        """Finish the job in hand and end."""
        self._stop.set()
        self._work.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def scrub_now(self) -> None:
        """Verify everything again, in the background."""
        self._next_scrub = 0.0
        self.nudge()

    # ---- the loop ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                busy = self._step()
            except (DreamfleetError, OSError) as error:  # a full disk, a segment evicted under the work
                log.warning("replay upkeep failed", extra={"why": str(error)})
                busy = False
            if not busy:
                self._idle.set()
                self._work.wait(TICK_SECONDS)
                self._work.clear()

    def _step(self) -> bool:
        """Do one job; False when there is none."""
        with self._lock:
            self._evict_aged()
            fresh = [e for e in self._log.entries() if not e.verified]
            frozen = self._log.frozen()
        if fresh:
            self._verify(fresh[-1])  # the newest first: training starts soon
            self._vouch()
            return True
        if frozen is not None:
            self._seal(frozen)
            return True
        if self._look_at_suspects():
            return True
        self._vouch()
        return self._stage() or self._scrub()

    def _vouch(self) -> None:
        with self._lock:
            now = tuple(entry.path for entry in self._log.entries() if entry.verified)
            if now == self._vouched:
                return
            self._log.vouch()
            self._vouched = now
            self._log.changed()

    def _evict_aged(self) -> None:
        if self._max_age is not None:
            self._log.evict_older(time.time() - self._max_age)

    # ---- verify, seal -----------------------------------------------------------------------------

    def _verify(self, entry: Entry) -> None:
        """Check a segment of an earlier life, or again; damage sends it into quarantine."""
        damage = check_entry(entry)
        with self._lock:
            if not self._log.holds(entry):
                return
            if damage is None:
                entry.verified = True
            else:
                self._log.lose(entry, damage.reason, damage.what)

    def _look_at_suspects(self) -> bool:
        """Verify a segment of which a reader says that a chunk failed its check; False when there is none."""
        with self._lock:
            entries = {entry.path: entry for entry in self._log.entries()}
        for place in {path.parent for path in entries}:
            for path, why in damage_reports(place):
                entry = entries.get(path)
                if entry is None:
                    continue
                if entry.stored.tier == "far":  # its chunks are not here, and failed twice on arrival
                    with self._lock:
                        if self._log.holds(entry):
                            self._log.lose(entry, "checksum", why)
                else:
                    self._verify(entry)
                return True
        return False

    def _seal(self, entry: Entry) -> None:
        segment = entry.segment
        if segment is None:
            segment = Segment.open(entry.path, *self._log.format.tables)
        damage = check_entry(entry)
        if damage is not None:
            with self._lock:
                if self._log.holds(entry):
                    self._log.lose(entry, damage.reason, damage.what)
            return
        if self._durable:
            segment.flush()
        release_unused(segment)
        about = describe(entry.stored, segment, entry.born)
        try:
            manifest = seal.seal(entry.path, about)
        except (PreflightError, FileNotFoundError):
            with self._lock:
                if not self._log.holds(entry):
                    return  # evicted meanwhile
            raise
        with self._lock:
            if not self._log.holds(entry):
                return
            entry.sealed, entry.segment, entry.committed = True, None, manifest.committed
            entry.nbytes = bytes_on_disk(entry.path)
        log.info("segment sealed", extra={"segment": entry.path.name, "rows": entry.rows})

    # ---- stages, scrub ----------------------------------------------------------------------------

    def _stage(self) -> bool:
        for stage in self._stages:
            if time.monotonic() < self._not_before.get(stage.name, 0.0):
                continue
            with self._lock:
                sealed = {e.stored.path: e for e in self._log.entries() if e.sealed}
            picked = stage.pick([entry.stored for entry in sealed.values()])
            if picked is None:
                continue
            entry = sealed[picked.path]
            try:
                made = stage.work(picked, picked.path.parent / layout.SCRATCH)
            except (DreamfleetError, OSError) as error:
                if picked.path.exists():  # not merely evicted under the work
                    self._not_before[stage.name] = time.monotonic() + RETRY_SECONDS
                    log.warning("stage failed", extra={"stage": stage.name, "why": str(error)})
                continue
            if made is not None:
                self._publish(entry, *made)
            return True
        return False

    def _publish(self, entry: Entry, draft: Path, tier: layout.Tier) -> None:
        with self._lock:
            if self._log.holds(entry):
                self._log.replace(entry, draft, tier)
                return
        layout.remove((draft,))

    def _scrub(self) -> bool:
        """Verify one segment again; damage sends it into quarantine."""
        now = time.monotonic()
        if not self._scrub_queue:
            if (self._scrub_seconds <= 0 and self._next_scrub > 0) or now < self._next_scrub:
                return False
            self._next_scrub = now + (self._scrub_seconds or float("inf"))
            with self._lock:
                self._scrub_queue = list(self._log.entries())
            log.info("scrub begins", extra={"segments": len(self._scrub_queue)})
        entry = self._scrub_queue.pop()
        with self._lock:
            if not self._log.holds(entry):
                return True
        self._verify(entry)
        return True

    def _flush_every(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                flush(self._log, self._lock)
            except (DreamfleetError, OSError) as error:
                log.error("flush failed", extra={"why": str(error)})


def flush(segments: SegmentLog, lock: threading.Condition) -> None:
    """Bring what was appended so far to the device, then write down that it is there. Waits for the disk.

    Raises: PreflightError when the disk refuses.
    """
    with lock:
        dirty = segments.take_dirty()
    if not dirty:
        return
    committed = {segment.path.name: segment.committed.tolist() for segment in dirty}  # before the flush
    try:
        for segment in dirty:
            segment.flush()
            layout.sync_dirs(segment.path)
    except OSError as error:
        raise PreflightError(
            f"cannot flush {segments.directory} ({error.strerror}); check the disk"
        ) from error
    with lock:
        value = {
            "format": layout.FORMAT, "epoch": segments.ledger.epoch, "boot": segments.ledger.boot,
            "unixtime": time.time(), "committed": committed,
        }  # fmt: skip
    layout.write_json(segments.directory / "flushed.json", value, durable=True)


def check_entry(entry: Entry) -> Damage | None:
    """What is wrong with a segment as it lies on disk, None when nothing is."""
    path = entry.path
    try:
        if seal.is_sealed(path):
            found = seal.verify(path)
            return found[0] if found else None
        if entry.sealed or not path.exists():
            return Damage(reason="missing", what=f"{path} or its manifest is gone")
        segment = entry.segment
        assert segment is not None, path
        for file, size in segment.sizes().items():
            if (actual := file.stat().st_size) != size:
                return Damage(reason="size", what=f"{file} has {actual} bytes, not {size}")
        for slot, used in enumerate(segment.committed.tolist()):
            if used and segment.good_rows(slot, used) < used:
                return Damage(reason="rows", what=f"{path} slot {slot}: rows fail their checks")
    except FileNotFoundError as error:
        return Damage(reason="missing", what=str(error))
    except IntegrityError as error:
        return Damage(reason="damaged", what=str(error))
    return None
