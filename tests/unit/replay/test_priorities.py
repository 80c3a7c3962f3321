"""Priorities by block against a dictionary; draws and importance weights against hand computation."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from replay.index import StartIndex
from replay.priorities import FLOOR, BlockPriorities
from replay.selection import Prioritized
from replay.starts import BLOCK_ROWS, PlainStarts
from system.errors import SchemaError
from system.experience import SequenceIds


def ids(*places: tuple[int, int, int]) -> SequenceIds:
    shard, stream, start = np.asarray(places).T
    return SequenceIds(
        shard=shard.astype(np.int32), stream=stream.astype(np.int32), start=start.astype(np.int64)
    )


def ones(batch: int, length: int, value: float = 1.0) -> np.ndarray:
    return np.full((batch, length), value, np.float32)


def entries(index: StartIndex[str], priorities: BlockPriorities) -> dict[tuple[int, int, int], float]:
    """(shard, stream, block) -> scaled priority of what is live, fragments of one block counted once."""
    blocks = PlainStarts(index).blocks()
    weights = iter(priorities.weights().tolist())
    rows = zip(*(column.tolist() for column in blocks[:4]), strict=True)
    return {(k, s, b): next(weights) for k, s, first, n in rows for b in range(first, first + n)}


places = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 700))


@given(
    runs=st.lists(st.tuples(places, st.integers(1, 300)), min_size=1, max_size=6, unique_by=lambda r: r[0]),
    writes=st.lists(st.tuples(places, st.integers(1, 90), st.floats(0, 9, width=32)), max_size=6),
    drops=st.sets(st.integers(0, 5), max_size=3),
)
def test_priorities_follow_their_blocks_whatever_comes_and_goes(
    runs: list[tuple[tuple[int, int, int], int]],
    writes: list[tuple[tuple[int, int, int], int, float]],
    drops: set[int],
) -> None:
    index: StartIndex[str] = StartIndex(5)
    priorities, model = BlockPriorities(1.0), {}
    homes = [f"home {n}" for n in range(len(runs))]
    for n, ((shard, stream, start), count) in enumerate(runs):
        index.add(shard, stream, start, homes[n], 0, count)
        priorities.follow(PlainStarts(index).blocks())
        for (k, s, at), length, value in writes[n : n + 1]:
            live = {p for lo, hi in index.stream(k, s).bounds for p in range(lo, hi)}
            covers = entries(index, priorities)
            where = ids((k, s, at))
            gone = priorities.write(where.shard, where.stream, where.start, ones(1, length, value))
            touched = [p for p in range(at, at + length) if (k, s, p // BLOCK_ROWS) in covers]
            assert gone == length - len(touched)
            assert set(touched) >= live & set(range(at, at + length))
            model |= {(k, s, p // BLOCK_ROWS): value + np.float32(FLOOR) for p in touched}
    for n in sorted(drops):
        if n < len(homes):
            index.drop(homes[n])
            priorities.follow(PlainStarts(index).blocks())
            model = {block: value for block, value in model.items() if block in entries(index, priorities)}
    top = max(model.values(), default=1.0)
    for block, value in entries(index, priorities).items():
        assert value == pytest.approx(model.get(block, top)), block


def test_a_block_takes_the_mean_of_what_was_written_to_its_rows() -> None:
    index: StartIndex[str] = StartIndex(4)
    index.add(0, 0, 0, "home", 0, 200)
    priorities = BlockPriorities(1.0)
    priorities.follow(PlainStarts(index).blocks())
    values = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    where = ids((0, 0, 62), (0, 0, 10))
    assert priorities.write(where.shard, where.stream, where.start, values) == 0
    weights = priorities.weights()
    assert weights[0] == pytest.approx((1 + 2 + 5 + 6 + 7 + 8) / 6, abs=1e-4)
    assert weights[1] == pytest.approx((3 + 4) / 2, abs=1e-4)
    assert weights[2] == weights[:2].max()  # never written: as good as the best


def prioritized(
    exponent: float, importance: float, half_life: float = 0.0
) -> tuple[Prioritized, PlainStarts]:
    """Streams of 150 and 100 rows; the priorities of their blocks are 1, 4, 0.5 and 2, none yet."""
    index: StartIndex[str] = StartIndex(9)
    index.add(0, 0, 0, "a", 0, 150)
    index.add(1, 7, 64, "b", 0, 100)
    selector, starts = Prioritized(exponent, importance, half_life), PlainStarts(index)
    for place, value in {(0, 0, 0): 1.0, (0, 0, 64): 4.0, (0, 0, 128): 0.5, (1, 7, 64): 2.0}.items():
        assert selector.write(starts, ids(place), 0, ones(1, 5, value), 1) == 0
    return selector, starts


def by_hand(exponent: float) -> np.ndarray:
    """Probability of every legal start, in canonical order."""
    blocks = [(1.0, 64), (4.0, 64), (0.5, 150 - 8 - 128), (2.0, 64), (4.0, 100 - 8 - 64)]
    weights = np.concatenate([np.full(count, (p + FLOOR) ** exponent) for p, count in blocks])
    return weights / weights.sum()


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_starts_are_drawn_in_proportion_to_the_priority_of_their_block(exponent: float) -> None:
    selector, starts = prioritized(exponent, 0.5)
    picks = selector.draw(np.random.default_rng(1), starts, 40_000)
    rank = np.where(picks.shard == 0, picks.start, picks.start - 64 + 142)
    seen = np.bincount(rank, minlength=starts.total)
    wanted = by_hand(exponent)
    assert len(wanted) == starts.total == len(seen)
    assert stats.chisquare(seen, wanted * len(rank)).pvalue > 0.001
    weights = (starts.total * wanted[rank]) ** -0.5
    np.testing.assert_allclose(picks.weight, weights, rtol=1e-4)


def test_full_importance_weights_make_means_those_of_uniform_draws() -> None:
    selector, starts = prioritized(1.0, 1.0)
    picks = selector.draw(np.random.default_rng(2), starts, 200_000)
    value = np.where(picks.shard == 0, picks.start, -picks.start).astype(float)
    everything = starts.pick(np.arange(starts.total))
    truth = np.where(everything.shard == 0, everything.start, -everything.start).mean()
    assert (picks.weight * value).mean() == pytest.approx(truth, abs=1.0)
    assert picks.weight.mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("exponent", "value"), [(2.0, 1e30), (8.0, 0.0)])
def test_powers_beyond_float32_leave_finite_weights(exponent: float, value: float) -> None:
    selector, starts = prioritized(exponent, 0.4)
    for place in ((0, 0, 0), (0, 0, 64), (0, 0, 128), (1, 7, 64), (1, 7, 128)):
        selector.write(starts, ids(place), 0, ones(1, 5, value), 1)
    picks = selector.draw(np.random.default_rng(0), starts, 2000)
    np.testing.assert_allclose(picks.weight, 1.0, rtol=1e-6)
    assert len(set(zip(picks.shard.tolist(), picks.start.tolist(), strict=True))) == starts.total


def test_with_a_half_life_what_is_known_fades_towards_the_best() -> None:
    selector, starts = prioritized(1.0, 0.4, half_life=10.0)
    before = selector.priorities.weights()[:5].copy()
    for _ in range(10):
        selector.draw(np.random.default_rng(0), starts, 2)
    top = before.max()
    np.testing.assert_allclose(selector.priorities.weights(), top + (before - top) / 2, rtol=1e-5)


def test_priorities_of_evicted_rows_are_dropped_and_counted() -> None:
    selector, starts = prioritized(1.0, 0.4)
    starts.index.drop("a")
    assert selector.write(starts, ids((0, 0, 10), (1, 7, 70)), 2, ones(2, 6), 1) == 6
    assert len(selector.priorities.weights()) == 2


def test_a_stride_spreads_the_rows_of_a_priority() -> None:
    selector, starts = prioritized(1.0, 0.4)
    selector.write(starts, ids((0, 0, 0)), 1, ones(1, 2, 9.0), 40)  # rows 40 and 80
    assert selector.priorities.weights()[:3] == pytest.approx([9, 9, 0.5], abs=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        np.ones((1, 3), np.float64),
        np.ones((2, 3), np.float32),
        np.ones(3, np.float32),
        np.asarray([[np.nan]], np.float32),
        np.asarray([[-1.0]], np.float32),
        np.asarray([[np.inf]], np.float32),
    ],
)
def test_priorities_that_cannot_be_are_refused(wrong: np.ndarray) -> None:
    selector, starts = prioritized(1.0, 0.4)
    with pytest.raises(SchemaError, match="priority"):
        selector.write(starts, ids((0, 0, 0)), 0, wrong, 1)


def test_saved_priorities_are_taken_up_bit_for_bit_even_beside_other_rows() -> None:
    selector, starts = prioritized(0.7, 0.4, half_life=5.0)
    rng = np.random.default_rng(3)
    for _ in range(30):
        picks = selector.draw(rng, starts, 4)
        where = ids(*zip(picks.shard, picks.stream, picks.start, strict=True))
        selector.write(starts, where, 0, rng.random((4, 8), np.float32), 1)
    state = json.loads(json.dumps(selector.state()))
    other = Prioritized(0.7, 0.4, 5.0)
    other.load(state)
    for seed in range(5):
        mine, its = (s.draw(np.random.default_rng(seed), starts, 64) for s in (selector, other))
        for a, b in zip(mine, its, strict=True):
            np.testing.assert_array_equal(a, b)
    starts.index.drop("a")
    late = Prioritized(0.7, 0.4, 5.0)
    late.load(state)
    late.look(starts)
    other.look(starts)
    late.priorities._clock = other.priorities._clock
    np.testing.assert_array_equal(late.priorities.weights(), other.priorities.weights())


def test_the_state_of_ten_million_rows_is_small_and_only_news_is_encoded_again() -> None:
    index: StartIndex[str] = StartIndex(65)
    rows = 10_000_000 // 50
    for stream in range(50):
        index.add(0, stream, 0, f"home {stream}", 0, rows)
    selector, starts = Prioritized(0.6, 0.4, 0.0), PlainStarts(index)
    selector.look(starts)
    first = selector.state()
    assert len(json.dumps(first)) < 2_000_000
    selector.write(starts, ids((0, 3, 1000)), 0, ones(1, 64), 1)
    again = selector.state()
    changed = [a is not b for a, b in zip(first["values"], again["values"], strict=True)]
    assert 1 <= sum(changed) <= 2
