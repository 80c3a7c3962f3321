"""What a shard remembers beyond its segments: its life, what left it, the newest row of every stream.

Written twice, `ledger.copy.json` first, each with a digest: one of the two survives whatever happens to the
other. When both are lost, `recovery` rebuilds them from the segments.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replay import layout
from replay.admission import Cursor, stream_of
from system.errors import IntegrityError, PreflightError

log = logging.getLogger(__name__)

NAMES = ("ledger.copy.json", "ledger.json")
RESERVE = ".reserve"
RESERVE_BYTES = 1 << 18
"""Disk blocks kept back, so that a full disk does not stop the eviction that would make room."""


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Made by `read_ledger` and `recovery`, changed and saved by `log`."""

    epoch: int = 0  # lives of the shard
    evicted_rows: int = 0  # rows that left for good, by eviction or damage
    evicted_through: int = -1  # number of the newest evicted segment
    lost_rows: int = 0  # of evicted_rows: by damage
    skipped: int = 0  # positions passed over without rows, because nobody knew how many there had been
    forgotten: int = 0  # rows that a stream nobody remembers may have had; it may go on anywhere
    boot: str = ""  # boot of the machine in which the shard was opened
    cursors: dict[int, Cursor] = field(default_factory=dict[int, Cursor])  # by stream key


def boot_id() -> str:
    """What changes when the machine restarts; empty where nothing tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def save_ledger(directory: Path, ledger: Ledger) -> None:
    """Raises: PreflightError when the disk refuses, even with the reserve given up."""
    cursors = {
        str(stream_of(key)): [key, c.position, c.incarnation, c.episode, c.step, int(c.is_last), int(c.torn)]
        for key, c in ledger.cursors.items()
    }
    write_ledger(
        directory,
        {
            "epoch": ledger.epoch,
            "evicted_rows": ledger.evicted_rows,
            "evicted_through": ledger.evicted_through,
            "lost_rows": ledger.lost_rows,
            "skipped": ledger.skipped,
            "forgotten": ledger.forgotten,
            "boot": ledger.boot,
            "cursors": cursors,
        },
    )


def write_ledger(directory: Path, values: Mapping[str, Any]) -> None:
    """Write both copies. Raises: PreflightError when the disk refuses, even with the reserve given up."""
    document = {**values, "format": layout.FORMAT}
    document.pop("digest", None)
    document["digest"] = _digest(document)
    try:
        for name in NAMES:
            layout.write_json(directory / name, document)
    except PreflightError:
        reserve = directory / RESERVE
        if not reserve.exists():
            raise
        reserve.unlink()
        for name in NAMES:
            layout.write_json(directory / name, document)


def keep_reserve(directory: Path) -> None:
    """Take the reserve, again if it had to be given up; a full disk is no error here."""
    path = directory / RESERVE
    if path.exists():
        return
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(handle, 0, RESERVE_BYTES)
        except OSError:
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def read_ledger(directory: Path) -> tuple[Ledger | None, list[str]]:
    """The better of the two copies, None when there is none; and what was wrong with each damaged one."""
    wrong: list[str] = []
    for name in reversed(NAMES):
        path = directory / name
        try:
            value = layout.read_json(path)
            if value is None:
                continue
            digest = value.pop("digest", None)
            if digest != _digest(value):
                raise IntegrityError(f"{path} does not have the digest it names")
            return _parse(value), wrong
        except IntegrityError as error:
            wrong.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wrong.append(f"{path} lacks what a ledger holds ({error!r})")
    return None, wrong


def _parse(value: Mapping[str, Any]) -> Ledger:
    ledger = Ledger(
        epoch=int(value["epoch"]),
        evicted_rows=int(value["evicted_rows"]),
        evicted_through=int(value["evicted_through"]),
        lost_rows=int(value.get("lost_rows", 0)),
        skipped=int(value.get("skipped", 0)),
        forgotten=int(value.get("forgotten", 0)),
        boot=str(value.get("boot", "")),
    )
    for key, position, incarnation, episode, step, is_last, torn in value["cursors"].values():
        ledger.cursors[int(key)] = Cursor(
            position=int(position),
            incarnation=int(incarnation),
            episode=int(episode),
            step=int(step),
            is_last=bool(is_last),
            torn=bool(torn),
        )
    return ledger


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
