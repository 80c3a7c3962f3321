"""Exact batches: equal latents whoever is faster, and a state that holds what was drawn ahead."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from learner.batches import Batches
from learner.checkpoint import CheckpointStore
from system.errors import PreflightError
from system.experience import Sequence, WriteBack
from tests.unit.learner.toy_learning import BATCH, TIME, RowReader, eventually

TIMEOUT = 20.0


@pytest.fixture
def batches_of() -> Iterator:
    """Makes exact Batches that are stopped when the test ends."""
    made: list[Batches] = []

    def make(reader: RowReader, depth: int) -> Batches:
        made.append(Batches(reader, depth, TIMEOUT, exact=True))
        return made[-1]

    yield make
    for batches in made:
        batches.stop()


def use(batches: Batches, number: int) -> np.ndarray:
    """Take a batch and give all its rows the latent `number`; return the latents it came with."""
    sequence: Sequence = batches.next()
    latent = np.array(sequence.columns["latent"])
    values = np.full((BATCH, TIME), number, np.float32)
    batches.write_back(WriteBack(ids=sequence.ids, offset=0, columns={"latent": values}))
    return latent


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_latents_come_back_at_a_fixed_distance_whoever_is_faster(batches_of, depth: int) -> None:
    def latents(hurry: bool) -> list[np.ndarray]:
        reader = RowReader()
        batches, found = batches_of(reader, depth), []
        for number in range(1, 40):
            found.append(use(batches, number))
            if not hurry:  # let the thread draw all it may
                eventually(lambda drawn=number + depth: reader.draws >= drawn)
        return found

    one, other = latents(hurry=True), latents(hurry=False)
    np.testing.assert_array_equal(one, other)
    assert np.stack(one).any()


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("idle", [False, True], ids=["at-once", "run-ahead"])
def test_a_state_goes_on_with_the_very_same_batches(
    batches_of, tmp_path: Path, depth: int, idle: bool
) -> None:
    reader = RowReader()
    batches = batches_of(reader, depth)
    for number in range(1, 12):
        use(batches, number)
    if idle:
        eventually(lambda: reader.draws >= 11 + depth)
    state, latent = batches.snapshot(reader.latent.copy)
    path = CheckpointStore(tmp_path, keep=1).save(11, {"reader": deepcopy(state)}, {})
    expected = [use(batches, number) for number in range(12, 30)]

    again = RowReader()
    again.latent[:] = latent  # what pins and undo journal do for a replay on disk
    resumed = batches_of(again, depth)
    resumed.load(CheckpointStore(tmp_path, keep=1).load(path).state["reader"])
    np.testing.assert_array_equal([use(resumed, number) for number in range(12, 30)], expected)


def test_what_a_snapshot_raises_reaches_the_learner_and_drawing_goes_on(batches_of) -> None:
    batches = batches_of(RowReader(), 2)
    use(batches, 1)

    def full() -> None:
        raise PreflightError("the disk is full")

    with pytest.raises(PreflightError, match="full"):
        batches.snapshot(full)
    for number in range(2, 8):
        use(batches, number)


def test_a_snapshot_before_the_first_batch_holds_nothing_drawn_ahead(batches_of) -> None:
    state, taken = batches_of(RowReader(), 2).snapshot(lambda: 7)
    assert (state["ahead"], taken) == ({"drawn": [], "written": []}, 7)
