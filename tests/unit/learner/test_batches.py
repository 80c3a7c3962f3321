import threading

import numpy as np
import pytest

from learner.batches import Batches
from system.errors import DeadlineError, IntegrityError
from system.experience import WriteBack
from tests.unit.learner.toy_learning import BATCH, TIME, RowReader, eventually

TIMEOUT = 20.0


@pytest.fixture
def stopped():
    """Batches made through this are stopped when the test ends."""
    made: list[Batches] = []

    def make(*args, **kwargs) -> Batches:
        made.append(Batches(*args, **kwargs))
        return made[-1]

    yield make
    for batches in made:
        batches.stop()


def starts(batches: Batches, count: int) -> list[list[int]]:
    return [batches.next().ids.start.tolist() for _ in range(count)]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_batches_come_in_the_readers_order(stopped, depth: int):
    plain = RowReader()
    expected = [plain.sample(1.0).ids.start.tolist() for _ in range(20)]
    assert starts(stopped(RowReader(), depth, TIMEOUT), 20) == expected


@pytest.mark.parametrize(("depth", "ring"), [(1, 1), (3, 1), (3, 5)])
def test_a_batch_stays_as_it_was_while_others_are_drawn_ahead(stopped, depth: int, ring: int):
    reader = RowReader(ring=ring)
    batches = stopped(reader, depth, TIMEOUT, ring=ring)
    for consumed in range(1, 30):
        sequence = batches.next()
        eventually(lambda drawn=consumed + depth: reader.draws >= drawn)  # the thread has run ahead
        for b, start in enumerate(sequence.ids.start):
            np.testing.assert_array_equal(sequence.columns["obs"][b], reader.obs[start : start + TIME])


def test_batches_are_copied_into_buffers_of_the_callers_making(stopped):
    made = []

    def buffer(array: np.ndarray) -> np.ndarray:
        made.append(np.empty_like(array))
        return made[-1]

    reader = RowReader()
    batches = stopped(reader, 2, TIMEOUT, ring=100, buffer=buffer)
    got = [batches.next().columns for _ in range(6)]
    assert {id(array) for columns in got for array in columns.values()} <= {id(array) for array in made}
    assert len(made) == 4 * len(got[0])  # queued, being drawn, in use


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_is_drawn_ahead(stopped, depth: int):
    reader = RowReader()
    batches = stopped(reader, depth, TIMEOUT)
    batches.next()
    eventually(lambda: reader.draws == depth + 1)
    eventually(reader.pumped.is_set)  # idle and full: grants are kept flowing instead
    assert reader.draws == depth + 1


@pytest.mark.parametrize("depth", [0, 3])
def test_the_state_is_that_of_the_last_batch_handed_out(stopped, depth: int):
    reader = RowReader()
    batches = stopped(reader, depth, TIMEOUT)
    starts(batches, 7)
    state = batches.state()
    following = starts(batches, 5)
    resumed = RowReader()
    resumed.load(state)
    assert state["draws"] == 7
    assert starts(stopped(resumed, depth, TIMEOUT), 5) == following


@pytest.mark.parametrize("depth", [0, 3])
def test_the_state_before_the_first_batch_is_the_readers_own(stopped, depth: int):
    reader = RowReader()
    assert stopped(reader, depth, TIMEOUT).state() == reader.state()


@pytest.mark.parametrize("depth", [0, 2])
def test_what_the_reader_raises_reaches_the_consumer(stopped, depth: int):
    reader = RowReader()
    batches = stopped(reader, depth, TIMEOUT)
    batches.next()
    reader.fail_with = IntegrityError("segment is damaged")
    with pytest.raises(IntegrityError, match="segment is damaged"):
        starts(batches, 10)


@pytest.mark.parametrize("depth", [0, 2])
def test_no_batch_in_time_is_a_deadline_that_says_why_and_heals(stopped, depth: int):
    reader = RowReader()
    reader.open_gate.clear()
    batches = stopped(reader, depth, 0.3)
    with pytest.raises(DeadlineError, match="prefill"):
        batches.next()
    reader.open_gate.set()
    eventually(lambda: batches.next() is not None)


@pytest.mark.parametrize("depth", [0, 2])
def test_write_backs_reach_the_rows_they_name(stopped, depth: int):
    reader = RowReader()
    batches = stopped(reader, depth, TIMEOUT)
    sequence = batches.next()
    ones = np.ones((BATCH, TIME - 1), np.float32)
    batches.write_back(WriteBack(ids=sequence.ids, offset=1, columns={"latent": ones}))
    eventually(lambda: reader.latent[sequence.ids.start[0] + 1] == 1)
    assert set(np.flatnonzero(reader.latent)) == {s + t for s in sequence.ids.start for t in range(1, TIME)}


def test_pending_write_backs_are_written_before_the_thread_ends():
    reader = RowReader()
    batches = Batches(reader, 2, TIMEOUT)
    sequence = batches.next()
    reader.open_gate.clear()
    batches.write_back(
        WriteBack(ids=sequence.ids, offset=0, columns={"latent": np.ones((BATCH, TIME), np.float32)})
    )
    batches.stop()
    assert reader.latent[sequence.ids.start].tolist() == [1] * BATCH


def test_only_one_thread_ever_touches_the_reader(stopped):
    reader = RowReader()
    batches = stopped(reader, 2, TIMEOUT)
    for _ in range(20):
        sequence = batches.next()
        batches.write_back(
            WriteBack(ids=sequence.ids, offset=0, columns={"latent": np.ones((BATCH, TIME), np.float32)})
        )
    batches.stop()
    assert len(reader.threads) == 1
    assert threading.get_ident() not in reader.threads


@pytest.mark.parametrize("gate_open", [True, False])
def test_stop_ends_the_thread(gate_open: bool):
    reader = RowReader()
    batches = Batches(reader, 2, TIMEOUT)
    batches.next()
    if not gate_open:
        reader.open_gate.clear()
    before = threading.active_count()
    batches.stop()
    assert threading.active_count() == before - 1
    batches.stop()


def test_nothing_comes_after_stop():
    batches = Batches(RowReader(), 1, TIMEOUT)
    batches.stop()
    with pytest.raises(DeadlineError, match="after stop"):
        batches.next()
