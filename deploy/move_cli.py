"""The command `dreamfleet replay move`: takes over what a shard left that does not come back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click


@click.command(name="move")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--from", "source", type=int, required=True, help="The shard that gives; nobody may own it.")
@click.option("--to", "target", type=int, required=True, help="The shard that takes; nobody may own it.")
@click.option("--rows", type=int, help="At most so many rows; default: what fits.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to verify the rows.")
def move(directory: Path, source: int, target: int, rows: int | None, timeout: float) -> None:
    """Move sealed segments between two shards of DIR, a run or a replay, the oldest first."""
    from replay import layout
    from replay.adoption import adopt_shard, open_again
    from replay.inventory import find_root
    from system.errors import ConfigError

    root = find_root(directory)
    if source == target or not {source, target} <= set(layout.shard_indices(root)):
        raise ConfigError(
            f"--from ({source}) and --to ({target}) must be two of the shards {layout.shard_indices(root)}"
        )
    table = layout.read_table(root)[0]
    with closing(open_again(root, target, table)) as taker:
        room = max(0, taker.capacity_rows - taker.stats().rows)
        asked = room if rows is None else min(rows, room)
        moved = adopt_shard(root, source, table, taker, room_rows=asked, timeout=timeout)
    click.echo(f"{moved} rows moved from shard {source} to shard {target} of {root}")
