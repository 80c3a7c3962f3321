"""Taking over what a shard left whose owner is dead and does not come back."""

from __future__ import annotations

from pathlib import Path

from replay import layout
from replay.move import Taker, move_all
from replay.shard import ReplayShard
from system.errors import DeadlineError, IntegrityError
from system.specs import TableSpec


def adopt_shard(
    root: Path, dead: int, table: TableSpec, target: Taker, *, room_rows: int, timeout: float
) -> int:
    """Recover shard `dead`, seal what it left and move up to `room_rows` rows to `target`; return the rows.

    What does not fit stays readable where it is, as do rows that came from `target`; so do the shard's
    lifetime counters. Repeat it to go on.

    Raises: PreflightError when the shard is alive; IntegrityError without its geometry; DeadlineError when
    `timeout` seconds are not enough to verify it.
    """
    shard = open_again(root, dead, table)
    try:
        if not shard.settle(timeout):
            raise DeadlineError(f"shard {dead} was not verified within {timeout:g} s; try again")
        return move_all(shard, target, room_rows)
    finally:
        shard.close()


def open_again(root: Path, index: int, table: TableSpec) -> ReplayShard:
    """Own a shard whose process is gone, with the capacity it had.

    Raises: PreflightError when it is alive; IntegrityError when it says no capacity.
    """
    path = layout.shard_dir(root, index) / "shard.json"
    about = layout.read_json(path)
    if about is None or not isinstance(about.get("capacity_rows"), int):
        raise IntegrityError(f"{path} must say capacity_rows; is there a shard {index}?")
    return ReplayShard(root, index, table, capacity_rows=about["capacity_rows"], initial_grant=0)
