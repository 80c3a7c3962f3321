"""Damaged segments: out of sight of every reader, kept for whoever wants to look, counted, reported.

<shard>/quarantine/00000012-e0003.zarr-checksum, its overlay beside it. The newest few stay, so that a disk
that goes bad does not fill up with its own damage.
"""

from __future__ import annotations

import logging
from pathlib import Path

from replay import layout
from system.metrics import Metrics

log = logging.getLogger(__name__)
SUSPECTS = "suspects"
"""Directory in a shard where readers leave the names of segments that failed a check."""
KEEP = 8
"""Segments kept in quarantine; older ones are deleted."""


def quarantine(
    directory: Path, segment: Path, reason: str, what: str, metrics: Metrics | None = None
) -> Path | None:
    """Move a segment and its overlay aside; None when nothing of it is left. `what` goes into the log."""
    place = directory / layout.QUARANTINE
    place.mkdir(exist_ok=True)
    _forget_oldest(place)
    target: Path | None = None
    for path in (segment, layout.overlay_path(segment)):
        if not path.exists():
            continue
        to = place / f"{path.name}-{reason}"
        serial = 1
        while to.exists():
            serial += 1
            to = place / f"{path.name}-{reason}-{serial}"
        path.rename(to)
        target = target or to
    if metrics is not None:
        metrics.labels("replay_segments_quarantined_total", reason=reason).inc()
    log.error(
        "replay segment quarantined",
        extra={"segment": str(segment), "reason": reason, "what": what, "kept": str(target)},
    )
    return target


def quarantined(directory: Path) -> list[Path]:
    """Segments in quarantine, oldest first, without their overlays."""
    place = directory / layout.QUARANTINE
    if not place.is_dir():
        return []
    found = [path for path in place.iterdir() if ".overlay.zarr-" not in path.name]
    return sorted(found, key=lambda path: (path.lstat().st_ctime_ns, path.name))


def _forget_oldest(place: Path) -> None:
    for path in quarantined(place.parent)[: -(KEEP - 1)]:
        stem = path.name.split(".")[0]
        layout.remove([path, *place.glob(f"{stem}.overlay.zarr-*")])


def report_damage(segment: Path, why: str) -> None:
    """Ask the owner of the shard to look at a segment; a reader that may not write there only logs it."""
    note = segment.parent / SUSPECTS / segment.name
    if note.exists():
        return
    log.warning("replay chunk damaged", extra={"segment": str(segment), "why": why})
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(why + "\n")
    except OSError as error:
        log.warning("damage not reported", extra={"segment": str(segment), "cause": error.strerror})


def damage_reports(directory: Path) -> list[tuple[Path, str]]:
    """The segments that readers reported, with what they said; the reports are taken away."""
    found: list[tuple[Path, str]] = []
    try:
        notes = sorted((directory / SUSPECTS).iterdir())
    except FileNotFoundError:
        return found
    for note in notes:
        found.append((directory / note.name, note.read_text(errors="replace").strip()))
        note.unlink(missing_ok=True)
    return found
