"""The commands under `dreamfleet replay`. Each imports what it needs when it runs."""

from __future__ import annotations

import click

from deploy import dataset_cli, inventory_cli
from deploy.limit_cli import limit
from deploy.move_cli import move


@click.group()
def replay() -> None:
    """Look into stored experience, and move it in and out as datasets."""


for _command in (*inventory_cli.COMMANDS, *dataset_cli.COMMANDS):
    replay.add_command(_command)
replay.add_command(limit)
replay.add_command(move)
