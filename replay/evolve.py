"""Schema evolution: rows of an older schema read as rows of a newer one, without touching what is stored.

A column only the newer schema has reads as its default; one only the older schema has is ignored; a changed
dtype or shape is refused with the command that makes a new table (`replay.datasets.migrate`). Every segment
carries the schema it was written under. Used where segments are opened (`replay.segment`, `replay.follow`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from replay.rows import RowViews
from system.errors import SchemaError
from system.specs import ACTION_MASK, ArraySpec, TableSpec

if TYPE_CHECKING:
    from replay.follow import SegmentHome

MAX_TARGETS = 32
"""Batches a reader copies into in turn; for each the columns of the older schema are picked once."""


def obstacles(found: TableSpec, wanted: TableSpec) -> Iterator[tuple[str, str]]:
    """(column, why) for each column that keeps rows of schema `found` from being read as `wanted`."""
    for name, spec in wanted.all.items():
        there = found.all.get(name)
        if there is not None:
            same = (there.shape, there.dtype) == (spec.shape, spec.dtype)
            fits = there.kind == spec.kind and there.classes <= spec.classes
            if not same or not (fits or (not there.classes and not spec.classes)):
                shown = (
                    f"{s.dtype}{list(s.shape)} {s.kind} {s.classes or ''}".strip() for s in (there, spec)
                )
                yield name, "stored as {}, wanted as {}".format(*shown)
        elif not has_default(name, spec, wanted):
            yield name, "not stored, and without a default"


def has_default(name: str, spec: ArraySpec, wanted: TableSpec) -> bool:
    """Overlay columns begin as zeros; unknown actions are zeros where a mask says that they are unknown."""
    known = spec.default is not None or name in wanted.overlay or name == ACTION_MASK
    return known or (name == "action" and ACTION_MASK in wanted.columns)


def check_readable(where: str, found: TableSpec, wanted: TableSpec) -> None:
    """Raises: SchemaError naming every column in the way and the command that migrates."""
    problems = list(obstacles(found, wanted))
    if not problems:
        return
    listed = "; ".join(f"column {name} {why}" for name, why in problems)
    changed = [f"--cast {n}={wanted.all[n].dtype}" for n, why in problems if why.startswith("stored")]
    missing = [f"--fill {n}=VALUE" for n, why in problems if not why.startswith("stored")]
    raise SchemaError(
        f"replay at {where} has schema {found.digest[:12]} but this run needs {wanted.digest[:12]} "
        f"({listed}); "
        f"make a table that fits with `dreamfleet replay migrate {where} NEW "
        f"{' '.join(changed + missing)}`, choose "
        "another replay root, or run with the settings that made it"
    )


def default_row(name: str, spec: ArraySpec, found: TableSpec) -> NDArray[Any]:
    """What one row of a column reads as that `found` does not have, of the column's shape."""
    value = spec.default or 0.0
    if name == ACTION_MASK:
        value = float("action" in found.columns)
    return np.full(spec.shape, value, spec.dtype)


class EvolvedHome:
    """A segment written under schema `found`, read as `wanted`. A Home whose targets are of `wanted`."""

    def __init__(self, home: SegmentHome, found: TableSpec, wanted: TableSpec) -> None:
        """Raises: SchemaError when `found` cannot be read as `wanted`."""
        check_readable("this segment", found, wanted)
        self._home, self._found, self._wanted = home, found, wanted
        self._defaults = {
            name: default_row(name, spec, found) for name, spec in wanted.all.items() if name not in found.all
        }
        self._parts: dict[int, tuple[RowViews, RowViews]] = {}  # by id of a target: it, and what is stored

    slot_rows = property(lambda self: self._home.slot_rows)
    slots = property(lambda self: self._home.slots)
    committed = property(lambda self: self._home.committed)
    distant = property(lambda self: self._home.distant)

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home."""
        self._home.copy_rows(self._stored(target), at, first, count)
        for name, row in self._defaults.items():
            target.columns[name][at : at + count] = row

    def will_need(self, first: int, count: int) -> None:
        """As Home."""
        self._home.will_need(first, count)

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home: 0 for a column the segment does not have."""
        return self._home.write_overlay(name, first, values) if name in self._found.overlay else 0

    def _stored(self, target: RowViews) -> RowViews:
        """The columns of `target` that the segment has, in its order; those nobody wants go into scratch."""
        known = self._parts.get(id(target))
        if known is not None and known[0] is target:
            return known[1]
        columns = {
            name: target.columns[name]
            if name in target.columns
            else np.empty((target.rows, *spec.shape), spec.dtype)
            for name, spec in self._found.all.items()
        }
        if len(self._parts) >= MAX_TARGETS:
            self._parts.clear()
        part = RowViews(columns)
        self._parts[id(target)] = target, part
        return part
