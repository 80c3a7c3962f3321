"""The command `dreamfleet replay limit`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="limit")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--train-ratio", type=float, help="Trained rows per inserted row from now on.")
@click.option(
    "--tolerance", type=click.IntRange(1), help="Rows that either side may be ahead of the other from now on."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def limit(run: Path, train_ratio: float | None, tolerance: int | None, as_json: bool) -> None:
    """Change the train ratio of RUN while it runs; refused when both sides would then wait for ever."""
    from deploy.limit import ask_limit

    change = ask_limit(run, train_ratio=train_ratio, tolerance=tolerance)
    click.echo(json.dumps(change.to_dict()) if as_json else change.text())
