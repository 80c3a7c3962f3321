"""Schema evolution: rows of an older schema read as rows of a newer one, without touching what is stored.

A column only the newer schema has reads as its default; one only the older schema has is ignored
(`replay.schema`). Wraps what opens segments of any tier (`replay.follow`); `replay.history` says which
schemas a table has had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.episodes import FlagHome
from replay.rows import RowViews
from replay.schema import check_readable
from system.errors import IntegrityError, PreflightError, SchemaError
from system.specs import ACTION_MASK, ArraySpec, TableSpec

if TYPE_CHECKING:
    from replay.follow import OpenSegment
    from replay.rows import SegmentHome

MAX_TARGETS = 32
"""Batches a reader copies into in turn; for each the columns of the older schema are picked once."""


def evolving(openers: Mapping[str, OpenSegment], root: Path, *, foreign: bool) -> dict[str, OpenSegment]:
    """Openers that read segments of any schema the table at `root` has had under the one asked for.

    Raises: as `layout.read_history`.
    """
    known = _Known(root)
    return {ending: partial(_open, opener, known, foreign) for ending, opener in openers.items()}


class _Known:
    """The schemas of a table; read again when a segment has another one: somebody may have evolved it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.history = layout.read_history(root)

    def open(self, opener: OpenSegment, path: Path, wanted: TableSpec) -> tuple[SegmentHome, TableSpec]:
        """A segment and its schema. Raises: as OpenSegment."""
        try:
            return self._try(opener, path, (wanted, *self.history.tables))
        except SchemaError:
            try:
                history = layout.read_history(self._root)
            except (IntegrityError, SchemaError, PreflightError):
                history = self.history  # no fault of the segment
            if history.tables == self.history.tables:
                raise
            self.history = history
            return self._try(opener, path, self.history.tables)

    @staticmethod
    def _try(opener: OpenSegment, path: Path, tables: Sequence[TableSpec]) -> tuple[SegmentHome, TableSpec]:
        *most, last = tables
        for table in most:  # few, and each costs a look at the segment's own words
            try:
                return opener(path, table), table
            except SchemaError:
                continue
        return opener(path, last), last


def _open(opener: OpenSegment, known: _Known, foreign: bool, path: Path, wanted: TableSpec) -> SegmentHome:
    home, found = known.open(opener, path, wanted)
    if found.digest == wanted.digest and not (foreign and found.overlay):
        return home
    wanted = known.history.filled(wanted)
    return ForeignHome(home, found, wanted) if foreign else EvolvedHome(home, found, wanted)


def default_row(name: str, spec: ArraySpec, found: TableSpec) -> NDArray[Any]:
    """What one row of a column reads as that `found` does not have, of the column's shape."""
    value = spec.default or 0.0
    if name == ACTION_MASK:
        value = float("action" in found.columns)
    return np.full(spec.shape, value, spec.dtype)


def _alike(found: ArraySpec, wanted: ArraySpec | None) -> bool:
    """Whether stored values are what is wanted; overlays of another shape are not, and begin as zeros."""
    return wanted is not None and (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


class EvolvedHome:
    """A segment written under schema `found`, read as `wanted`: a SegmentHome with targets of `wanted`."""

    def __init__(self, home: SegmentHome, found: TableSpec, wanted: TableSpec) -> None:
        """Raises: SchemaError when `found` cannot be read as `wanted`."""
        check_readable("this segment", found, wanted)
        self._home, self._found, self._wanted = home, found, wanted
        self._kept = {
            name for name, spec in self._stored_columns().items() if _alike(spec, wanted.all.get(name))
        }
        self._defaults = {
            name: default_row(name, spec, found)
            for name, spec in wanted.all.items()
            if name not in self._kept
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
        ours = name in self._found.overlay and name in self._kept
        return self._home.write_overlay(name, first, values) if ours else 0

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

    def _stored_columns(self) -> Mapping[str, ArraySpec]:
        """The stored columns that may be read."""
        return self._found.all

    def _stored(self, target: RowViews) -> RowViews:
        """The columns of `target` that the segment has, in its order; those nobody wants go into scratch."""
        known = self._parts.get(id(target))
        if known is not None and known[0] is target:
            return known[1]
        columns = {
            name: target.columns[name]
            if name in target.columns and name in self._kept
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

    def _stored_columns(self) -> Mapping[str, ArraySpec]:
        return self._found.columns
