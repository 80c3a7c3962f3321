"""The command line is frozen: a verb comes or goes only together with this list and docs/cli.md."""

import re
from pathlib import Path

import click

from deploy.__main__ import cli

VERBS = {"train", "recipes", "eval", "status", "audit", "video", "doctor", "env check", "export"}
VERBS |= {"replay ls", "replay stats", "replay verify", "replay repair"}
VERBS |= {"replay export", "replay import", "replay migrate", "replay limit", "replay move"}


def leaves(group: click.Group, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, command in group.commands.items():
        path = f"{prefix} {name}".strip()
        found |= leaves(command, path) if isinstance(command, click.Group) else {path}
    return found


def test_verbs_are_the_frozen_ones() -> None:
    assert leaves(cli) == VERBS


def test_every_verb_says_what_it_does() -> None:
    context = click.Context(cli)
    for path in VERBS:
        command: click.Command = cli
        for word in path.split():
            assert isinstance(command, click.Group)
            found = command.get_command(context, word)
            assert found is not None
            command = found
        assert command.get_short_help_str(), path


def test_cli_page_documents_every_verb(root: Path) -> None:
    headings = set(
        re.findall(r"^### `dreamfleet ([a-z ]+?)(?: [A-Z\[].*)?`$", (root / "docs/cli.md").read_text(), re.M)
    )
    assert headings == VERBS
