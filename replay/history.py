"""Which schemas a table has had: what table.json says, and when a run may go on under another one.

Segments keep the schema they were written under, so a table whose environment shows another key goes on
without a stored byte being touched: the new schema is written down, the former ones stay beside it, and older
rows are read through `replay.evolve`. Pure; `replay.layout` keeps the file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from replay.schema import check_readable
from system.errors import SchemaError
from system.specs import TableSpec

KEYS = {"format", "digest", "table", "former", "replay", "check"}


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The schemas of one table. Made by `replay.layout`."""

    table: TableSpec  # what is appended now
    former: tuple[TableSpec, ...] = ()  # what older segments may have, the latest first
    replay: str = ""  # id of the replay

    @property
    def tables(self) -> tuple[TableSpec, ...]:
        """All schemas, the present one first."""
        return (self.table, *self.former)

    def find(self, digest: str) -> TableSpec | None:
        """The schema with this digest."""
        return next((table for table in self.tables if table.digest == digest), None)

    def filled(self, table: TableSpec) -> TableSpec:
        """`table`, columns without a default having the one that an earlier opening gave them."""
        known = {
            name: spec.default
            for past in reversed(self.tables)
            for name, spec in past.columns.items()
            if spec.default is not None
        }
        columns = {
            name: replace(spec, default=known[name]) if spec.default is None and name in known else spec
            for name, spec in table.columns.items()
        }
        return TableSpec(columns=columns, overlay=table.overlay)

    def under(self, table: TableSpec, where: Path, *, evolve: bool) -> History:
        """The history once rows of `table` are appended; itself when nothing changes.

        Raises: SchemaError when rows of some schema cannot be read as `table`, or the schema differs and
        nobody asked to `evolve` it.
        """
        wanted = self.filled(table)
        if wanted.digest == self.table.digest:
            same = wanted.to_json() == self.table.to_json()
            return self if same else replace(self, table=wanted)
        for found in self.tables:
            check_readable(where, found, wanted, own=True)
        if not evolve:
            raise SchemaError(_unasked(self, wanted, where))
        former = tuple(found for found in self.tables if found.digest != wanted.digest)
        return replace(self, table=wanted, former=former)

    def to_json(self, version: int) -> dict[str, Any]:
        """As table.json has it; `version` is that of the format."""
        document = {
            "format": version,
            "digest": self.table.digest,
            "table": self.table.to_json(),
            "former": [{"digest": past.digest, "table": past.to_json()} for past in self.former],
            "replay": self.replay,
        }
        return document | {"check": _check(document)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """Raises: ValueError saying what is wrong."""
        body = {key: part for key, part in value.items() if key != "check"}
        if set(value) != KEYS:
            raise ValueError(f"it must have the entries {sorted(KEYS)} but has {sorted(value)}")
        if value["check"] != _check(body):
            raise ValueError("it does not have the digest it names")
        try:
            named = [(value["digest"], TableSpec.from_json(value["table"]))]
            named += [(past["digest"], TableSpec.from_json(past["table"])) for past in value["former"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no valid schema: {error!r}") from error
        if any(digest != table.digest for digest, table in named):
            raise ValueError("schema and digest disagree")
        present, *former = (table for _, table in named)
        return cls(table=present, former=tuple(former), replay=str(value["replay"]))


def carried(attributes: Iterable[Mapping[str, Any]]) -> History | None:
    """The history that segments tell by their attributes; None when none carries a schema.

    That of the replay most of them belong to; the newest segment has the present schema.
    """
    found: list[tuple[str, int, int, TableSpec]] = []
    for about in attributes:
        try:
            table = TableSpec.from_json(about["table"])
            place = str(about["replay"]), int(about["epoch"]), int(about["number"])
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if table.digest == about.get("schema"):
            found.append((*place, table))
    if not found:
        return None
    replay = Counter(one[0] for one in found).most_common(1)[0][0]
    ours = sorted((one for one in found if one[0] == replay), key=lambda one: one[1:3], reverse=True)
    tables = list({one[3].digest: one[3] for one in ours}.values())  # each where it is met first
    return History(table=tables[0], former=tuple(tables[1:]), replay=replay)


def _check(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _unasked(history: History, wanted: TableSpec, where: Path) -> str:
    stored = history.table
    added, dropped = sorted(wanted.all.keys() - stored.all), sorted(stored.all.keys() - wanted.all)
    changes = [f"adds {', '.join(added)}"] * bool(added) + [f"lacks {', '.join(dropped)}"] * bool(dropped)
    gone_on = "a former schema of this replay, which has gone on since" if history.find(wanted.digest) else ""
    about = "; ".join([gone_on] * bool(gone_on) + changes) or "other classes"
    return (
        f"replay at {where} has schema {stored.digest[:12]} but this run writes {wanted.digest[:12]} "
        f"({about}; stored: {', '.join(sorted(stored.all))}); to go on in it, set replay.evolve=true, or "
        "choose another replay root, read this one as one of replay.sources, or run with the settings that "
        "made it"
    )
