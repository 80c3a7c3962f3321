"""The whole episodes of a replay table, alive or not, read only: what exports write.

Reads through the same view and homes as the sampler, so every tier is covered. Rows that were there when the
iteration began are read; what a live shard evicts meanwhile is left out and counted. Episodes whose first
rows are gone are left out; those still running, or cut off by the death of their actor, too, unless asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.datasets.episodes import About, Episode, Tally, about_table
from replay.index import StreamRuns
from replay.rows import Home, RowsGone, RowViews
from replay.view import TableView
from system.errors import DeadlineError, SchemaError
from system.specs import ActionSpec, TableSpec

BLOCK_BYTES = 16 << 20
MAX_BLOCK_ROWS = 4096
MAX_EPISODE_BYTES = 4 << 30
"""An episode must fit in memory; a longer one is refused by name."""

SETTLE_SECONDS = 3600.0

HEADLESS, OPEN, GONE = "episode without its beginning", "episode without its end", "evicted while read"
Rows = dict[str, NDArray[Any]]


class TableEpisodes:
    """EpisodeSource over the replay at `root`. `tally.skipped` counts the rows left out."""

    def __init__(self, root: Path, name: str, action: ActionSpec | None, *, cut_open: bool = False) -> None:
        """`action` says what the action column means, None for action-free tables. With `cut_open`, episodes
        without an end come out as truncated at their newest row.

        Raises: SchemaError without a table, or when it does not fit `action`; IntegrityError when damaged.
        """
        self._table, _ = layout.read_table(root)
        self.about: About = about_table(name, self._table, action)
        self.root = root
        self._cut_open = cut_open
        self._view = open_settled(root, self._table)
        self.tally = Tally()

    @property
    def rows(self) -> int:
        """Live rows, an upper bound of what comes out."""
        return self._view.index.rows

    def __iter__(self) -> Iterator[Episode]:
        self._view.refresh()
        self.tally = Tally()
        for (shard, stream), runs in sorted(self._view.index.streams.items()):
            for lo, hi in list(runs.bounds):
                name = f"{self.root} shard {shard} stream {stream >> 16}.{stream & 0xFFFF}"
                yield from self._episodes(name, self._counted(blocks(self._view, runs, lo, hi)))

    def close(self) -> None:
        """Let go of the maps."""
        self._view.release()

    def _counted(self, found: Iterator[Rows | int]) -> Iterator[Rows | None]:
        """The blocks, None in place of rows that went meanwhile, which are counted."""
        for block in found:
            if isinstance(block, int):
                self.tally.skip(GONE, block)
                yield None
            else:
                yield block

    def _episodes(self, name: str, blocks: Iterator[Rows | None]) -> Iterator[Episode]:
        """The whole episodes of one fragment of a stream."""
        pending: list[Rows] = []  # of the episode that was open at the end of a block
        for block in blocks:
            if block is None:
                self.tally.skip(OPEN, _count(pending))
                pending = []
                continue
            for piece in _pieces(block):
                if piece["is_first"][0]:
                    yield from self._ended(name, pending)
                    pending = []
                elif not pending:
                    self.tally.skip(HEADLESS, len(piece["is_first"]))
                    continue
                pending.append(piece)
                if piece["is_last"][-1]:
                    yield self._episode(name, pending)
                    pending = []
                self._check_size(name, pending)
        yield from self._ended(name, pending)

    def _ended(self, name: str, pending: list[Rows]) -> Iterator[Episode]:
        """An episode whose end never came: left out, or truncated at its newest row."""
        if not pending or not self._cut_open:
            self.tally.skip(OPEN, _count(pending))
            return
        last = {key: values.copy() for key, values in pending[-1].items()}
        last["is_last"][-1] = True
        if "action" in last:
            last["action"][-1] = 0  # nobody acts on the last row
        yield self._episode(name, [*pending[:-1], last])

    def _episode(self, name: str, pieces: Sequence[Rows]) -> Episode:
        numbers = (int(pieces[0][key][0]) for key in ("incarnation", "episode"))
        joined = {
            key: pieces[0][key] if len(pieces) == 1 else np.concatenate([piece[key] for piece in pieces])
            for key in self.about.columns
        }
        return Episode(name="{} incarnation {} episode {}".format(name, *numbers), columns=joined)

    def _check_size(self, name: str, pending: list[Rows]) -> None:
        nbytes = _count(pending) * self._table.row_nbytes
        if nbytes > MAX_EPISODE_BYTES:
            raise SchemaError(
                f"{name}: an episode of more than {_count(pending)} rows ({nbytes >> 20} MiB) must fit into "
                f"{MAX_EPISODE_BYTES >> 20} MiB; give the environment a time limit"
            )


def open_settled(root: Path, table: TableSpec) -> TableView:
    """All rows of a table, after their checksums were looked at where nobody alive vouches for them.

    Raises: DeadlineError when that takes too long; as `TableView`.
    """
    view = TableView(root, table, 1)
    if not view.settle(SETTLE_SECONDS):
        view.release()
        raise DeadlineError(
            f"the rows of {root} were not checked within {SETTLE_SECONDS:g} s; check its disk, then try again"
        )
    return view


def blocks(view: TableView, runs: StreamRuns[Home], lo: int, hi: int) -> Iterator[Rows | int]:
    """Rows lo .. hi - 1 of a stream in order, some at a time; of those that went meanwhile their number."""
    specs = view.table.all
    size = max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES // max(1, view.table.row_nbytes)))
    for position in range(lo, hi, size):
        count = min(size, hi - position)
        block = {key: np.empty((count, *spec.shape), spec.dtype) for key, spec in specs.items()}
        views, at = RowViews(block), 0
        try:
            for piece in runs.pieces(position, count):
                piece.home.copy_rows(views, at, piece.first, piece.rows)
                at += piece.rows
        except RowsGone:
            yield count
            continue
        yield block


def _pieces(block: Rows) -> Iterator[Rows]:
    """A block cut before every is_first and behind every is_last."""
    total = len(block["is_first"])
    cuts = {0, total, *np.flatnonzero(block["is_first"]).tolist()}
    bounds = sorted(cuts | {row + 1 for row in np.flatnonzero(block["is_last"]).tolist()})
    for begin, end in pairwise(bounds):
        yield {key: values[begin:end] for key, values in block.items()}


def _count(pieces: Sequence[Rows]) -> int:
    return sum(len(piece["is_first"]) for piece in pieces)
