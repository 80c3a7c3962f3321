"""Buffers that batches travel in: which are used when, and that a probe in between costs no batch its own."""

from itertools import pairwise

import numpy as np

from learner.transfer import KINDS, SLOTS, Turns


def arrays(rows: int) -> dict[str, np.ndarray]:
    return {"reward": np.zeros((rows, 3), np.float32), "image": np.zeros((rows, 2), np.uint8)}


def turns() -> tuple[Turns[int], list[tuple[int, ...]]]:
    """Turns whose buffers are numbers, and the shapes they were made for."""
    made: list[tuple[int, ...]] = []

    def make(given: dict[str, np.ndarray]) -> int:
        made.append(given["reward"].shape)
        return len(made)

    return Turns(make), made  # type: ignore[arg-type]


def test_batches_of_one_kind_take_turns() -> None:
    taken, made = turns()
    used = [taken.take(arrays(4)) for _ in range(7)]
    assert used == [1, 2, 1, 2, 1, 2, 1]
    assert len(made) == SLOTS


def test_probe_between_two_batches_costs_them_no_buffer() -> None:
    taken, made = turns()
    used = [taken.take(arrays(2 if call % 5 == 4 else 4)) for call in range(40)]
    assert len(made) == 2 * SLOTS
    batches = [buffers for call, buffers in enumerate(used) if call % 5 != 4]
    assert all(one != other for one, other in pairwise(batches)), "the batch before may still be read"


def test_kinds_are_told_apart_by_names_shapes_and_types_and_not_by_order() -> None:
    taken, made = turns()
    first = taken.take(arrays(4))
    taken.take(dict(reversed(arrays(4).items())))
    assert taken.take(arrays(4)) == first
    assert len(made) == SLOTS
    taken.take(arrays(4) | {"reward": np.zeros((4, 3), np.float64)})
    taken.take(arrays(4) | {"more": np.zeros(4)})
    assert len(made) == SLOTS + 2


def test_kind_not_seen_for_longest_makes_room() -> None:
    taken, made = turns()
    for rows in range(1, KINDS + 1):
        taken.take(arrays(rows))
    taken.take(arrays(1))  # kind 2 is the oldest now
    taken.take(arrays(9))
    before = len(made)
    taken.take(arrays(1))
    assert len(made) == before
    taken.take(arrays(2))
    assert len(made) == before + 1
