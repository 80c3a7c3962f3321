"""Schema evolution: rows of an older schema read as rows of a newer one, without touching what is stored.

A column only the newer schema has reads as its default; one only the older schema has is ignored
(`replay.schema`). Wraps what opens segments of any tier (`replay.follow`) for views that ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from replay.episodes import FlagHome
from replay.rows import RowViews
from replay.schema import check_readable
from system.specs import ACTION_MASK, ArraySpec, TableSpec

if TYPE_CHECKING:
    from replay.follow import OpenSegment
    from replay.rows import SegmentHome

MAX_TARGETS = 32
"""Batches a reader copies into in turn; for each the columns of the older schema are picked once."""


def evolving(
    openers: Mapping[str, OpenSegment], found: TableSpec, *, foreign: bool
) -> dict[str, OpenSegment]:
    """Openers whose segments were written under schema `found` and are read under the one asked for."""
    return {ending: partial(_open, opener, found, foreign) for ending, opener in openers.items()}


def _open(opener: OpenSegment, found: TableSpec, foreign: bool, path: Path, wanted: TableSpec) -> SegmentHome:
    home = opener(path, found)
    if found.digest == wanted.digest and not (foreign and found.overlay):
        return home
    return ForeignHome(home, found, wanted) if foreign else EvolvedHome(home, found, wanted)


def default_row(name: str, spec: ArraySpec, found: TableSpec) -> NDArray[Any]:
    """What one row of a column reads as that `found` does not have, of the column's shape."""
    value = spec.default or 0.0
    if name == ACTION_MASK:
        value = float("action" in found.columns)
    return np.full(spec.shape, value, spec.dtype)


class EvolvedHome:
    """A segment written under schema `found`, read as `wanted`: a SegmentHome with targets of `wanted`."""

    def __init__(self, home: SegmentHome, found: TableSpec, wanted: TableSpec) -> None:
        """Raises: SchemaError when `found` cannot be read as `wanted`."""
        check_readable("this segment", found, wanted)
        self._home, self._found, self._wanted = home, found, wanted
        self._defaults = {
            name: default_row(name, spec, found)
            for name, spec in wanted.all.items()
            if name not in self._kept(found)
        }
        self._parts: dict[int, tuple[RowViews, RowViews]] = {}  # by id of a target: it, and what is stored

    @property
    def replay_id(self) -> str:
        """As SegmentHome."""
        return self._home.replay_id

    @property
    def slot_rows(self) -> int:
        """As SegmentHome."""
        return self._home.slot_rows

    @property
    def slots(self) -> NDArray[np.int64]:
        """As SegmentHome."""
        return self._home.slots

    @property
    def committed(self) -> NDArray[np.int64]:
        """As SegmentHome."""
        return self._home.committed

    @property
    def distant(self) -> bool:
        """As ShardView."""
        return self._home.distant

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home."""
        self._home.copy_rows(self._stored(target), at, first, count)
        for name, row in self._defaults.items():
            target.columns[name][at : at + count] = row

    def first_flags(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """As episodes.FlagHome."""
        return self._home.first_flags(first, count) if isinstance(self._home, FlagHome) else None

    def will_need(self, first: int, count: int) -> None:
        """As Home."""
        self._home.will_need(first, count)

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home: 0 for a column the segment does not have."""
        return self._home.write_overlay(name, first, values) if name in self._found.overlay else 0

    def good_rows(self) -> NDArray[np.int64]:
        """As SegmentHome."""
        return self._home.good_rows()

    def mend(self) -> None:
        """As SegmentHome."""
        self._home.mend()

    @property
    def overlay_key(self) -> str:
        """As `replay.undo.Overlaid`."""
        return getattr(self._home, "overlay_key", "")

    @property
    def overlay_files(self) -> Mapping[str, NDArray[Any]]:
        """As `replay.undo.Overlaid`."""
        return getattr(self._home, "overlay_files", {})

    def _kept(self, found: TableSpec) -> Mapping[str, ArraySpec]:
        """The stored columns that are read."""
        return found.all

    def _stored(self, target: RowViews) -> RowViews:
        """The columns of `target` that the segment has, in its order; those nobody wants go into scratch."""
        known = self._parts.get(id(target))
        if known is not None and known[0] is target:
            return known[1]
        columns = {
            name: target.columns[name]
            if name in target.columns and name in self._kept(self._found)
            else np.empty((target.rows, *spec.shape), spec.dtype)
            for name, spec in self._found.all.items()
        }
        if len(self._parts) >= MAX_TARGETS:
            self._parts.clear()
        part = RowViews(columns)
        self._parts[id(target)] = target, part
        return part


class ForeignHome(EvolvedHome):
    """A segment of another run, read only. Overlay columns read as zeros: they are that run's caches."""

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home: always 0."""
        return 0

    def mend(self) -> None:
        """Nothing: it is not ours."""

    @property
    def overlay_files(self) -> Mapping[str, NDArray[Any]]:
        """None: nothing is ever overwritten."""
        return {}

    def _kept(self, found: TableSpec) -> Mapping[str, ArraySpec]:
        return found.columns
