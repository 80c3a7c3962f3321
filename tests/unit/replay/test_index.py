import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from replay.index import Run, StartIndex


def filled(runs: dict[tuple[int, int], list[int]], length: int) -> StartIndex[str]:
    """Streams of consecutive runs; each run has its own home named after its place."""
    index: StartIndex[str] = StartIndex(length)
    for (shard, stream), sizes in runs.items():
        position = 10 * stream  # positions need not begin at 0
        for n, size in enumerate(sizes):
            index.add(shard, stream, position, f"{shard}.{stream}.{n}", 100, size)
            position += size
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


def test_a_dropped_home_leaves_a_gap_and_keeps_the_rows_before_it() -> None:
    index = filled({(0, 0): [5, 5, 5]}, 3)
    runs = index.stream(0, 0)
    index.drop(runs.runs[1].home)
    assert runs.bounds == [(0, 5), (10, 15)]
    assert (index.rows, index.total) == (10, 6)
    assert [start for _, start in index.resolve(np.arange(6))] == [0, 1, 2, 10, 11, 12]
    index.add(0, 0, 5, "back", 0, 5)
    assert runs.bounds == [(0, 15)]
    assert list(runs.overlap(-3, 7)) == [(0, 7)]


def test_a_copy_of_rows_that_are_here_already_changes_nothing_but_where_they_lie() -> None:
    index = filled({(0, 0): [10, 10]}, 4)
    runs = index.stream(0, 0)
    index.add(0, 0, 10, "copy", 0, 10)
    assert (index.rows, index.total, runs.bounds) == (20, 17, [(0, 20)])
    assert [tuple(piece) for piece in runs.pieces(8, 4)] == [("0.0.0", 108, 2), ("copy", 0, 2)]
    index.drop("copy")
    assert [tuple(piece) for piece in runs.pieces(8, 4)] == [("0.0.0", 108, 2), ("0.0.1", 100, 2)]


SHARDS, STREAMS, POSITIONS = 2, 2, 60
change = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(0, 12), st.integers(0, 5)),
    st.tuples(st.just("grow"), st.integers(0, 99), st.integers(-6, 9), st.just(0)),
    st.tuples(st.just("trim"), st.integers(0, 99), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 99), st.just(0), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 5), st.just(0), st.just(0)),
    st.tuples(st.just("look"), st.just(0), st.just(0), st.just(0)),
)


@given(changes=st.lists(change, max_size=40), length=st.integers(1, 6))
def test_the_index_behaves_like_a_list_of_rows_per_stream(
    changes: list[tuple[str, int, int, int]], length: int
) -> None:
    index: StartIndex[str] = StartIndex(length)
    homes = [f"home {n}" for n in range(6)]
    model: dict[tuple[int, int], dict[int, tuple[str, int]]] = {}  # stream -> position -> (home, row)
    slots: list[tuple[Run[str], int, int]] = []  # runs with base and first row; bases lie 5 positions apart
    for number, (what, a, b, c) in enumerate(changes):
        if what == "add":
            shard, stream, base = a % 2, a // 2, 5 * b
            if all(
                (run.stream.shard, run.stream.stream, at) != (shard, stream, base) for run, at, _ in slots
            ):
                run = index.add(shard, stream, base, homes[c], 1000 * number, c)
                slots.append((run, base, 1000 * number))
        elif what == "drop":
            index.drop(homes[a])
            slots = [one for one in slots if one[0].home != homes[a]]
        elif what == "look":
            compare(index, slots, model, length)
        elif slots:
            run, base, _ = slots[a % len(slots)]
            if what == "grow":
                index.grow(run, min(run.end + b, base + 5))
            elif what == "trim":
                index.trim(run, min(run.start + b, base + 5))
            else:
                index.remove(run)
                del slots[a % len(slots)]
    compare(index, slots, model, length)


def compare(
    index: StartIndex[str],
    slots: list[tuple[Run[str], int, int]],
    model: dict[tuple[int, int], dict[int, tuple[str, int]]],
    length: int,
) -> None:
    """The model is made anew from the runs that are left, row by row."""
    model.clear()
    for run, base, first in slots:
        rows = model.setdefault((run.stream.shard, run.stream.stream), {})
        rows |= {p: (run.home, first + p - base) for p in range(run.start, run.end)}
    starts = [
        (key, position)
        for key in sorted(model)
        for position in sorted(model[key])
        if all(position + step in model[key] for step in range(length))
    ]
    assert index.rows == sum(map(len, model.values()))
    assert index.total == len(starts)
    drawn = index.resolve(np.arange(len(starts))) if starts else []
    assert [((runs.shard, runs.stream), position) for runs, position in drawn] == starts
    for runs, position in drawn:
        got = [
            (piece.home, piece.first + row)
            for piece in runs.pieces(position, length)
            for row in range(piece.rows)
        ]
        rows = model[runs.shard, runs.stream]
        assert got == [rows[position + step] for step in range(length)]
    fragments = index.fragments()
    order = list(zip(*(column.tolist() for column in fragments), strict=True))
    assert order == sorted(order)
    assert all(hi > lo for *_, lo, hi in order)
    assert sum(hi - lo for *_, lo, hi in order) == index.rows


def test_the_order_of_discovery_does_not_matter() -> None:
    sizes = {(0, 2): [7], (1, 0): [4, 4], (0, 1): [9]}
    one, other = filled(sizes, 3), filled(dict(reversed(sizes.items())), 3)
    draws = np.arange(one.total)
    a = [(r.shard, r.stream, p) for r, p in one.resolve(draws)]
    assert a == [(r.shard, r.stream, p) for r, p in other.resolve(draws)]


def test_starts_are_uniform_over_all_streams_and_fragments() -> None:
    index = filled({(0, 0): [40, 3], (0, 5): [2], (1, 0): [30], (2, 1): [9, 9]}, 5)
    index.add(1, 0, 100, "behind a gap", 0, 20)
    rng = np.random.default_rng(3)
    draws = rng.integers(0, index.total, 50_000)
    seen: dict[tuple[int, int, int], int] = {}
    for runs, position in index.resolve(draws):
        key = (runs.shard, runs.stream, position)
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == index.total == 39 + 26 + 14 + 16
    assert stats.chisquare(list(seen.values())).pvalue > 0.001
