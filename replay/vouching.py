"""What the owner of a shard vouches for: segments that it verified or filled, which readers need not vet.

Between `log`, which writes it down, `recovery`, which reads what an earlier life said, and `follow`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from replay import layout
from system.errors import IntegrityError


def write_verified(directory: Path, epoch: int, names: Iterable[str]) -> None:
    """Vouch for segments, by the paths they have inside the shard. Owner only."""
    value = {"format": layout.FORMAT, "epoch": epoch, "segments": list(names)}
    layout.write_json(directory / layout.VERIFIED, value | {"owner": layout.lock_owner(directory)})


def read_verified(directory: Path) -> frozenset[str] | None:
    """What the present owner of a shard vouches for; None when there is none, or none that said so yet.

    What an earlier one said does not count: the machine may have lost power since, or the disk a byte.
    """
    names, owner = _read(directory)
    return names if owner and owner == layout.lock_owner(directory) and layout.lock_held(directory) else None


def last_verified(directory: Path) -> frozenset[str]:
    """What the newest owner to say so vouched for, whether or not it lives."""
    return _read(directory)[0] or frozenset()


def _read(directory: Path) -> tuple[frozenset[str] | None, str]:
    try:
        value = layout.read_json(directory / layout.VERIFIED) or {}
    except IntegrityError:
        return None, ""
    names = value.get("segments")
    return (frozenset(map(str, names)) if isinstance(names, list) else None), str(value.get("owner", ""))
