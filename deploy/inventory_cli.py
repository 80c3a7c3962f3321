"""The commands `dreamfleet replay ls|stats|verify|repair`: they need no running shard."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from replay.inventory import Finding, SegmentLine

DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
MIB = 1 << 20


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table as wide as it needs to be; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for at, name in enumerate(head):
        numeric = bool(rows) and all(isinstance(row[at], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(soft_wrap=True, highlight=False).print(table)


def _show_findings(findings: Sequence[Finding]) -> None:
    _table("findings", ("where", "reason", "what"), [(f.where, f.reason, f.what) for f in findings])


@click.command(name="ls")
@DIRECTORY
@json_option
def ls(directory: Path, as_json: bool) -> None:
    """List the segments of DIR, a run or a replay, alive or not."""
    from replay.inventory import find_root, take_inventory

    root = find_root(directory)
    lines = take_inventory(root)
    if as_json:
        click.echo(json.dumps({"root": str(root), "segments": [asdict(line) for line in lines]}))
        return
    head = ("shard", "segment", "state", "tier", "rows", "streams", "MiB", "minutes", "note")
    rows = [
        (line.shard, line.name if line.origin == line.shard else f"{line.name} (of {line.origin})",
         line.state, line.tier, line.rows, line.streams, line.nbytes / MIB, line.age_seconds / 60, line.note)
        for line in lines
    ]  # fmt: skip
    _table(str(root), head, rows)


@click.command(name="stats")
@DIRECTORY
@json_option
def stats(directory: Path, as_json: bool) -> None:
    """Sum up what each shard of DIR holds and what it has lost."""
    from replay import layout
    from replay.inventory import find_root, take_inventory
    from replay.ledger import Ledger, read_ledger

    root = find_root(directory)
    lines = take_inventory(root)
    shards = []
    for index in layout.shard_indices(root):
        place = layout.shard_dir(root, index)
        mine = [line for line in lines if line.shard == index]
        live = [line for line in mine if line.state != "quarantined"]
        ledger = read_ledger(place)[0] or Ledger()
        shards.append(_sums(index, mine, live) | {
            "owned": layout.lock_held(place), "lives": ledger.epoch, "evicted_rows": ledger.evicted_rows,
            "lost_rows": ledger.lost_rows, "streams": len(ledger.cursors),
        })  # fmt: skip
    if as_json:
        click.echo(json.dumps({"root": str(root), "shards": shards}))
        return
    head = tuple(shards[0]) if shards else ("shard",)
    _table(str(root), head, [tuple(shard.values()) for shard in shards])


def _sums(index: int, mine: Sequence[SegmentLine], live: Sequence[SegmentLine]) -> dict[str, Any]:
    tiers = {tier: sum(line.tier == tier for line in live) for tier in ("raw", "cold", "far")}
    return {
        "shard": index,
        "rows": sum(line.rows for line in live if line.origin == index),
        "adopted_rows": sum(line.rows for line in live if line.origin != index),
        **tiers,
        "quarantined": len(mine) - len(live),
        "mib": round(sum(line.nbytes for line in mine) / MIB, 1),
    }


@click.command(name="verify")
@DIRECTORY
@json_option
def verify(directory: Path, as_json: bool) -> None:
    """Check every checksum under DIR, alive or not; changes nothing. Exit code 5 when there is damage."""
    from replay.inventory import find_root, verify_replay

    root = find_root(directory)
    rows, findings = verify_replay(root)
    if as_json:
        click.echo(json.dumps({"root": str(root), "rows": rows, "findings": [asdict(f) for f in findings]}))
    else:
        if findings:
            _show_findings(findings)
        click.echo(f"{root}: {rows} rows hold, {len(findings)} findings")
    sys.exit(5 if findings else 0)


@click.command(name="repair")
@DIRECTORY
@json_option
def repair(directory: Path, as_json: bool) -> None:
    """Mend DIR while nothing runs on it: cut damage off, quarantine, rebuild the books; say what was lost."""
    from replay.inventory import find_root, repair_replay

    root = find_root(directory)
    done = repair_replay(root)
    if as_json:
        click.echo(json.dumps({"root": str(root), **asdict(done)}))
        return
    if done.findings:
        _show_findings(done.findings)
    click.echo(
        f"{root}: {done.rows} rows can be sampled, {done.lost} acknowledged rows are lost, "
        f"{done.returned} came back from quarantine"
    )


COMMANDS = (ls, stats, verify, repair)
