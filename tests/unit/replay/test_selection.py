"""What selectors draw: exact distributions, exact shares, every new row once."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from replay.episodes import EpisodeStarts
from replay.index import StartIndex
from replay.rows import MemoryHome
from replay.selection import Online, Recency, Sampling, Uniform, split
from replay.starts import BLOCK_ROWS, PlainStarts
from system.errors import ConfigError

RUNS = {(0, 1): [(0, 70), (70, 30)], (0, 4): [(10, 40), (90, 60)], (2, 1): [(64, 25)], (3, 0): [(0, 5)]}


def filled(length: int) -> PlainStarts:
    """Several shards, streams, runs that meet, and a gap."""
    index: StartIndex[str] = StartIndex(length)
    for (shard, stream), runs in RUNS.items():
        for n, (start, count) in enumerate(runs):
            index.add(shard, stream, start, f"{shard} {stream} {n}", 0, count)
    return PlainStarts(index)


def numbers(starts: PlainStarts, picks: Any) -> np.ndarray:
    """Canonical numbers of drawn starts."""
    every = starts.pick(np.arange(starts.total))
    number = {place: n for n, place in enumerate(zip(*(c.tolist() for c in every[:3]), strict=True))}
    return np.asarray([number[place] for place in zip(*(c.tolist() for c in picks[:3]), strict=True)])


def test_uniform_reaches_every_legal_start_equally() -> None:
    starts = filled(9)
    assert starts.total == 92 + 32 + 52 + 17
    seen = np.bincount(numbers(starts, Uniform().draw(np.random.default_rng(0), starts, 40_000)))
    assert len(seen) == starts.total
    assert stats.chisquare(seen).pvalue > 0.001


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_recency_follows_its_documented_distribution(power: float) -> None:
    starts = filled(9)
    seen = np.bincount(
        numbers(starts, Recency(power).draw(np.random.default_rng(1), starts, 40_000)), minlength=starts.total
    )
    wanted: list[float] = []
    for count in (92, 32 + 52, 17):  # the fragments of a stream age together
        young_first = np.diff((np.arange(count + 1) / count) ** (1 / power))
        wanted += (young_first[::-1] * count / starts.total).tolist()
    assert stats.chisquare(seen, np.asarray(wanted) * seen.sum()).pvalue > 0.001


@given(
    runs=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(1, 200)),
        max_size=6,
        unique_by=lambda r: r[:2],
    ),
    length=st.integers(1, 150),
)
def test_blocks_count_the_legal_starts_of_their_rows(runs: list[tuple[int, int, int]], length: int) -> None:
    index: StartIndex[str] = StartIndex(length)
    for n, (stream, start, count) in enumerate(runs):
        index.add(0, stream, start, str(n), 0, count)
    starts = PlainStarts(index)
    blocks = starts.blocks()
    legal, at = blocks.legal.tolist(), 0
    assert sum(legal) == starts.total
    for (lo, hi), first, number in zip(
        zip(*index.fragments()[2:], strict=True), blocks.first, blocks.number, strict=True
    ):
        for block in range(first, first + number):
            begin, end = max(lo, block * BLOCK_ROWS), min(hi - length + 1, (block + 1) * BLOCK_ROWS)
            assert legal[at] == max(0, end - begin)
            at += 1
    assert at == len(legal)


@given(
    shares=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda s: sum(s) > 0.01),
    n=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_a_split_is_whole_and_never_more_than_one_off(shares: list[float], n: int, seed: int) -> None:
    counts = split(np.random.default_rng(seed), shares, n)
    exact = np.asarray(shares) / sum(shares) * n
    assert sum(counts) == n
    assert (np.abs(np.asarray(counts) - exact) < 1 + 1e-6).all()


def test_a_split_has_exactly_its_shares_in_expectation() -> None:
    rng = np.random.default_rng(0)
    shares = [1.0, 0.5, 0.1]
    mean = np.mean([split(rng, shares, 16) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, np.asarray(shares) / 1.6 * 16, atol=0.02)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"shares": {"newest": 1.0}}, "newest"),
        ({"shares": {"uniform": -1.0}}, "uniform"),
        ({"shares": {"uniform": float("nan")}}, "uniform"),
        ({"shares": {"uniform": 0.0}}, "> 0"),
        ({"shares": {}}, "> 0"),
        ({"exponent": -0.1}, "exponent"),
        ({"importance": -0.1}, "importance"),
        ({"half_life": -1.0}, "half_life"),
        ({"recency": 0.5}, "recency"),
        ({"backlog": 0}, "backlog"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling(**wrong)


# ---- online -----------------------------------------------------------------------------------------


def online(length: int, context: int, backlog: int = 100) -> tuple[Online, PlainStarts, StartIndex[str]]:
    index: StartIndex[str] = StartIndex(context + length)
    return Online(length, context, backlog), PlainStarts(index), index


def take(selector: Online, starts: Any, n: int) -> list[tuple[int, int, int]]:
    picks = selector.draw(np.random.default_rng(0), starts, n)
    return list(zip(*(column.tolist() for column in picks[:3]), strict=True))


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=12),
    length=st.integers(1, 9),
    context=st.integers(0, 2),
)
def test_every_new_row_is_trained_on_once_in_the_order_of_its_stream(
    steps: list[tuple[int, int]], length: int, context: int
) -> None:
    selector, starts, index = online(length, context, 10_000)
    selector.look(starts)
    runs = {stream: index.add(0, stream, 0, str(stream), 0) for stream in range(3)}
    trained: dict[int, list[int]] = {stream: [] for stream in runs}
    for stream, count in steps:
        index.grow(runs[stream], runs[stream].end + count)
        selector.look(starts)
        waiting = len(selector._queue)
        if waiting:
            for _, served, start in take(selector, starts, waiting):
                trained[served] += range(start + context, start + context + length)
    for stream, run in runs.items():
        assert trained[stream] == list(range(context, context + len(trained[stream])))
        assert run.end - context - len(trained[stream]) < length


def test_windows_are_served_in_the_order_in_which_they_became_complete() -> None:
    selector, starts, index = online(10, 0)
    selector.look(starts)
    runs = [index.add(0, stream, 0, str(stream), 0) for stream in range(2)]
    for stream, end in ((1, 10), (0, 10), (1, 25), (0, 20)):
        index.grow(runs[stream], end)
        selector.look(starts)
    assert take(selector, starts, 4) == [(0, 1, 0), (0, 0, 0), (0, 1, 10), (0, 0, 10)]


def test_rows_there_at_the_first_look_are_not_new_and_uniform_fills_in() -> None:
    selector, starts, index = online(8, 1)
    run = index.add(0, 0, 0, "home", 0, 300)
    selector.look(starts)
    assert not selector._queue
    assert len({start for _, _, start in take(selector, starts, 50)}) > 10
    index.grow(run, 316)
    assert take(selector, starts, 3)[:2] == [(0, 0, 299), (0, 0, 307)]


def test_the_backlog_is_bounded_and_keeps_the_newest() -> None:
    selector, starts, index = online(10, 0, backlog=3)
    selector.look(starts)
    index.add(0, 0, 0, "home", 0, 100)
    selector.look(starts)
    assert (len(selector._queue), selector.skipped) == (3, 7)
    assert take(selector, starts, 3) == [(0, 0, 70), (0, 0, 80), (0, 0, 90)]


def test_windows_evicted_while_they_wait_are_left_out() -> None:
    selector, starts, index = online(10, 0)
    selector.look(starts)
    index.add(0, 0, 0, "old", 0, 20)
    index.add(0, 0, 20, "new", 0, 20)
    selector.look(starts)
    index.drop("old")
    assert take(selector, starts, 2) == [(0, 0, 20), (0, 0, 30)]


def test_within_episodes_what_is_too_short_is_passed_over() -> None:
    flags = np.zeros(60, np.bool_)
    flags[[0, 10, 13, 30]] = True
    index: StartIndex[Any] = StartIndex(4)
    starts = EpisodeStarts(index, {})
    selector = Online(4, 0, 100)
    selector.look(starts)
    run = index.add(0, 0, 0, MemoryHome({"is_first": flags}), 0)
    for end in range(1, 61):
        index.grow(run, end)
        selector.look(starts)
    wanted = [0, 4, 13, 17, 21, 25, *range(30, 57, 4)]
    assert [start for _, _, start in take(selector, starts, len(wanted))] == wanted


def test_a_saved_queue_goes_on_where_it_was() -> None:
    selector, starts, index = online(10, 0)
    selector.look(starts)
    run = index.add(0, 5, 0, "home", 0, 35)
    take(selector, starts, 1)
    state = json.loads(json.dumps(selector.state()))
    index.grow(run, 50)
    wanted = take(selector, starts, 4)
    assert wanted == [(0, 5, 10), (0, 5, 20), (0, 5, 30), (0, 5, 40)]
    later = Online(10, 0, 100)
    later.load(state)
    assert take(later, starts, 4) == wanted
