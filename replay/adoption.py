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

    What does not fit stays readable where it is; so do the shard's lifetime counters. Repeat it to go on.

    Raises: PreflightError when the shard is alive; IntegrityError without its geometry; DeadlineError when
    `timeout` seconds are not enough to verify it.
    """
    path = layout.shard_dir(root, dead) / "shard.json"
    about = layout.read_json(path)
    if about is None:
        raise IntegrityError(f"{path} is missing; is there a shard {dead}?")
    shard = ReplayShard(root, dead, table, capacity_rows=int(about["capacity_rows"]), initial_grant=0)
    try:
        if not shard.settle(timeout):
            raise DeadlineError(f"shard {dead} was not verified within {timeout:g} s; try again")
        return move_all(shard, target, room_rows)
    finally:
        shard.close()
