"""The commands `dreamfleet replay export|import|migrate`. Import what they need when they run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from replay.datasets.episodes import Tally

PATH = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
cast_option = click.option(
    "--cast", "casts", multiple=True, metavar="KEY=DTYPE", help="Convert a column, e.g. vector=float32."
)
drop_option = click.option("--drop", multiple=True, metavar="KEY", help="Leave a column out.")


class _Progress:
    """A line on standard error every other second."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total = verb, total
        self.begun = self._next = time.monotonic()

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if now >= self._next + 2.0:
            self._next = now
            rate = tally.rows / max(now - self.begun, 1e-9)
            click.echo(f"{self._verb} {tally.rows} of {self._total} rows, {rate:.0f} rows/s", err=True)


def _report(verb: str, tally: Tally, path: Path, progress: _Progress, as_json: bool) -> None:
    seconds = time.monotonic() - progress.begun
    result: dict[str, Any] = {"path": str(path), "seconds": round(seconds, 3), **asdict(tally)}
    left_out = "".join(f"\n  left out {rows} rows: {why}" for why, rows in tally.skipped.items())
    text = (
        f"{verb} {tally.episodes} episodes, {tally.rows} rows, {tally.nbytes / 2**20:.1f} MiB in "
        f"{seconds:.1f} s: "
        f"{path}{left_out}"
    )
    click.echo(json.dumps(result) if as_json else text)


@click.command(name="export")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option(
    "--format", "form", type=click.Choice(["minari", "zarr", "npz"]), required=True, help="Of the dataset."
)
@click.option("--to", "target", type=PATH, required=True, help="Where the dataset goes; must not exist.")
@click.option("--name", help="Minari dataset id, e.g. cartpole-v0; default: from --to.")
@click.option(
    "--cut-open", is_flag=True, help="Episodes without an end come out as truncated at their newest row."
)
@json_option
def export_command(
    directory: Path, form: str, target: Path, name: str | None, cut_open: bool, as_json: bool
) -> None:
    """Write the whole episodes of DIR, a run or a replay, alive or not, as a dataset."""
    from deploy.datasets import open_replay, sink_maker
    from replay.datasets.export import export_dataset

    make_sink, least = sink_maker(form, target, name)
    source = open_replay(directory, cut_open=cut_open)
    try:
        progress = _Progress("exported", source.rows)
        tally = export_dataset(source, target, make_sink, progress, least_rows=least)
        for why, rows in source.tally.skipped.items():
            tally.skip(why, rows)
    finally:
        source.close()
    _report("exported", tally, target, progress, as_json)


@click.command(name="import")
@click.argument("path", type=PATH)
@click.option(
    "--to", "target", type=PATH, required=True, help="Folder for the replay; it gets the dataset's name."
)
@click.option("--name", help="Name of the replay; default: that of PATH.")
@cast_option
@drop_option
@json_option
def import_command(
    path: Path, target: Path, name: str | None, casts: tuple[str, ...], drop: tuple[str, ...], as_json: bool
) -> None:
    """Make a replay of the dataset at PATH (Minari, Zarr, npz), to train on as one of `replay.sources`."""
    from deploy.datasets import open_dataset, parse_casts
    from replay.datasets.ingest import import_dataset
    from system.specs import check_name

    root = target / check_name("replay", name or path.resolve().name)
    source = open_dataset(path, parse_casts(casts), drop)
    progress = _Progress("imported", source.rows)
    tally = import_dataset(source, root, progress)
    _report("imported", tally, root, progress, as_json)


@click.command(name="migrate")
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("target", metavar="DST", type=PATH)
@cast_option
@drop_option
@json_option
def migrate_command(
    source: Path, target: Path, casts: tuple[str, ...], drop: tuple[str, ...], as_json: bool
) -> None:
    """Write the replay SRC again as DST, with columns cast or dropped. SRC must not be in use."""
    from deploy.datasets import parse_casts
    from replay.datasets.migrate import migrate

    progress = _Progress("migrated", 0)
    tally = migrate(source, target, parse_casts(casts), drop, progress)
    _report("migrated", tally, target, progress, as_json)


COMMANDS = (export_command, import_command, migrate_command)
