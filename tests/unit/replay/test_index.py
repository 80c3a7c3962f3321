import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from replay.index import StartIndex
from replay.sampler import uniform


def filled(runs: dict[tuple[int, int], list[int]], length: int) -> StartIndex[str]:
    """Streams of consecutive runs; each run has its own home named after its place."""
    index: StartIndex[str] = StartIndex(length)
    for (shard, stream), sizes in runs.items():
        found = index.stream(shard, stream)
        position = 10 * stream  # positions need not begin at 0
        for n, size in enumerate(sizes):
            found.add(position, f"{shard}.{stream}.{n}", 100)
            position += size
        found.hi = position
    index.touch()
    return index


@given(
    sizes=st.dictionaries(
        st.tuples(st.integers(0, 2), st.integers(0, 3)), st.lists(st.integers(1, 9), max_size=5), max_size=6
    ),
    length=st.integers(1, 12),
)
def test_every_draw_is_a_different_legal_start_and_all_are_reached(
    sizes: dict[tuple[int, int], list[int]], length: int
) -> None:
    index = filled(sizes, length)
    wanted = {
        (key, 10 * key[1] + offset)
        for key, runs in sizes.items()
        for offset in range(max(0, sum(runs) - length + 1))
    }
    assert index.total == len(wanted)
    assert index.rows == sum(map(sum, sizes.values()))
    if wanted:
        drawn = index.resolve(np.arange(index.total))
        assert {((runs.shard, runs.stream), position) for runs, position in drawn} == wanted


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data(), length=st.integers(1, 20))
def test_pieces_cover_a_sequence_across_runs(sizes: list[int], data: st.DataObject, length: int) -> None:
    index = filled({(0, 1): sizes}, length)
    if not index.total:
        return
    draw = data.draw(st.integers(0, index.total - 1))
    runs, position = index.resolve(np.asarray([draw]))[0]
    rows = [
        (piece.home, piece.first - 100 + i)
        for piece in runs.pieces(position, length)
        for i in range(piece.rows)
    ]
    everything = [(f"0.1.{n}", i) for n, size in enumerate(sizes) for i in range(size)]
    begin = position - 10
    assert rows == everything[begin : begin + length]


def test_a_dropped_home_takes_its_rows_and_all_before_it() -> None:
    index = filled({(0, 0): [5, 5, 5]}, 3)
    runs = index.stream(0, 0)
    index.drop(runs.homes[1])
    assert (runs.lo, runs.hi, index.rows, index.total) == (10, 15, 5, 3)


def test_the_order_of_discovery_does_not_matter() -> None:
    sizes = {(0, 2): [7], (1, 0): [4, 4], (0, 1): [9]}
    one, other = filled(sizes, 3), filled(dict(reversed(sizes.items())), 3)
    draws = np.arange(one.total)
    a = [(r.shard, r.stream, p) for r, p in one.resolve(draws)]
    assert a == [(r.shard, r.stream, p) for r, p in other.resolve(draws)]


def test_starts_are_uniform_over_all_streams() -> None:
    index = filled({(0, 0): [40, 3], (0, 5): [2], (1, 0): [30], (2, 1): [9, 9]}, 5)
    rng = np.random.default_rng(3)
    draws = uniform(rng, index.total, 50_000)
    seen: dict[tuple[int, int, int], int] = {}
    for runs, position in index.resolve(draws):
        key = (runs.shard, runs.stream, position)
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == index.total == 39 + 26 + 14
    assert stats.chisquare(list(seen.values())).pvalue > 0.001
