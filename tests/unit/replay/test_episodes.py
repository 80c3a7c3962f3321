"""Starts within one episode against a list of rows: streams with gaps, eviction, rows that come later."""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replay.cold import ColdSegment
from replay.episodes import EpisodeStarts, FlagHome
from replay.evolve import EvolvedHome
from replay.far import FarSegment
from replay.index import Run, StartIndex
from replay.raw import MappedSegment
from replay.rows import MemoryHome, RowsGone, RowViews
from replay.starts import BLOCK_ROWS
from system.specs import ArraySpec

SPECS = {"is_first": ArraySpec(shape=(), dtype="bool")}


class Copied:
    """A home that can only copy whole rows, and may be gone."""

    def __init__(self, is_first: np.ndarray) -> None:
        self.inner = MemoryHome({"is_first": is_first})
        self.gone = False

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        if self.gone:
            raise RowsGone
        self.inner.copy_rows(target, at, first, count)

    def will_need(self, first: int, count: int) -> None:
        """Nothing to do."""

    def write_overlay(self, name: str, first: int, values: np.ndarray) -> int:
        return 0


def legal(is_first: list[bool], bounds: list[tuple[int, int]], span: int) -> list[int]:
    """Starts whose window is live and within one episode, by looking at every row."""
    return [
        start
        for lo, hi in bounds
        for start in range(lo, hi - span + 1)
        if not any(is_first[start + 1 : start + span])
    ]


def positions(starts: EpisodeStarts) -> list[int]:
    return starts.pick(np.arange(starts.total)).start.tolist()


streams = st.lists(st.integers(1, 6), min_size=1, max_size=30).map(
    lambda lengths: [step == 0 for n in lengths for step in range(n)]
)


@given(
    is_first=streams, cuts=st.lists(st.integers(0, 120), max_size=4), span=st.integers(1, 5), data=st.data()
)
def test_starts_are_those_whose_window_lies_in_one_episode_whatever_comes_and_goes(
    is_first: list[bool], cuts: list[int], span: int, data: st.DataObject
) -> None:
    edges = sorted({0, len(is_first), *(c for c in cuts if c < len(is_first))})
    order = data.draw(st.permutations(list(pairwise(edges))))
    index: StartIndex[Any] = StartIndex(span)
    starts = EpisodeStarts(index, SPECS)
    array = np.asarray(is_first)
    runs: list[Run[Any]] = []
    for n, (lo, hi) in enumerate(order):
        home = (MemoryHome if n % 2 else _copied)({"is_first": array[lo:hi]})
        runs.append(index.add(0, 3, lo, home, 0, hi - lo))
        live = index.stream(0, 3).bounds
        assert positions(starts) == legal(is_first, live, span)
        for f, (begin, end) in enumerate(live):
            marks = np.arange(begin, end + 1)
            wanted = [sum(s < e for s in legal(is_first, [(begin, end)], span)) for e in marks]
            assert starts._fragments[f].count_before(marks).tolist() == wanted
    gone = data.draw(st.sampled_from(runs))
    index.remove(gone)
    assert positions(starts) == legal(is_first, index.stream(0, 3).bounds, span)


def _copied(arrays: dict[str, np.ndarray]) -> Copied:
    return Copied(arrays["is_first"])


@given(is_first=streams, span=st.integers(1, 5))
def test_rows_that_come_one_by_one_are_counted_as_those_that_come_at_once(
    is_first: list[bool], span: int
) -> None:
    index: StartIndex[Any] = StartIndex(span)
    starts = EpisodeStarts(index, SPECS)
    run = index.add(0, 0, 0, MemoryHome({"is_first": np.asarray(is_first)}), 0)
    for end in range(1, len(is_first) + 1):
        index.grow(run, end)
        assert starts.total == len(legal(is_first, [(0, end)], span))
    index.trim(run, len(is_first) // 2)
    assert positions(starts) == legal(is_first, [(len(is_first) // 2, len(is_first))], span)


@given(is_first=streams, span=st.integers(1, 5), position=st.integers(0, 100))
def test_the_following_start_passes_over_episodes_that_are_too_short(
    is_first: list[bool], span: int, position: int
) -> None:
    index: StartIndex[Any] = StartIndex(span)
    starts = EpisodeStarts(index, SPECS)
    index.add(0, 0, 0, MemoryHome({"is_first": np.asarray(is_first)}), 0, len(is_first))
    wanted = [s for s in legal(is_first, [(0, len(is_first))], span) if s >= position]
    found, again = starts.following(0, 0, position)
    assert found == (wanted[0] if wanted else None)
    if found is None:  # what comes later may make a window from there on
        assert again >= position
        newest = max(i for i, first in enumerate(is_first) if first)
        assert again == max(position, newest) or position >= len(is_first)


def test_rows_that_are_gone_are_not_drawn_and_tried_again() -> None:
    index: StartIndex[Any] = StartIndex(4)
    starts = EpisodeStarts(index, SPECS)
    flags = np.zeros(20, np.bool_)
    lost = Copied(flags)
    lost.gone = True
    index.add(0, 0, 0, lost, 0, 20)
    index.add(0, 1, 0, MemoryHome({"is_first": flags}), 0, 20)
    assert starts.total == 17
    assert set(starts.pick(np.arange(17)).stream.tolist()) == {1}
    lost.gone = False
    assert starts.total == 34


def test_homes_on_this_node_give_is_first_without_the_other_columns() -> None:
    assert all(issubclass(home, FlagHome) for home in (MappedSegment, ColdSegment, FarSegment, EvolvedHome))


def test_a_million_tiny_episodes_take_little_memory_and_every_start_is_reached() -> None:
    span, episodes = 2, 1_000_000
    flags = np.tile([True, False, False], episodes)
    index: StartIndex[Any] = StartIndex(span)
    starts = EpisodeStarts(index, SPECS)
    index.add(0, 0, 0, MemoryHome({"is_first": flags}), 0, len(flags))
    assert starts.total == 2 * episodes
    drawn = starts.pick(np.linspace(0, starts.total - 1, 1000, dtype=np.int64)).start
    assert set((drawn % 3).tolist()) == {0, 1}
    assert int(starts.blocks().legal.sum()) == starts.total
    assert starts._borders[0, 0]._rows.nbytes <= 4 * 8 * episodes + 4096


def test_blocks_count_the_legal_starts_of_their_rows() -> None:
    rng = np.random.default_rng(0)
    flags = rng.random(700) < 0.1
    flags[0] = True
    index: StartIndex[Any] = StartIndex(5)
    starts = EpisodeStarts(index, SPECS)
    index.add(0, 0, 30, MemoryHome({"is_first": flags}), 0, 700)
    blocks = starts.blocks()
    first = int(blocks.first[0])
    wanted = np.bincount(np.asarray(positions(starts)) // BLOCK_ROWS - first, minlength=int(blocks.number[0]))
    assert blocks.legal.tolist() == wanted.tolist()
