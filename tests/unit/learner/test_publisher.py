import threading

import numpy as np
import pytest

from learner.publish import Publisher
from system.errors import DeadlineError, RejectedError
from system.metrics import Metrics
from system.params.memory import MemoryWeights
from system.weights import NO_VERSION, PolicyVersion, Weights
from tests.unit.learner.toy_learning import LinearAgent, eventually

TIMEOUT = 20.0


class SlowStore(MemoryWeights):
    """A store that is away until `here` is set, and remembers what it was offered."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.Event()
        self.offered: list[PolicyVersion] = []

    def publish(self, weights: Weights) -> None:
        self.offered.append(weights.version)
        if not self.here.wait(0.01):
            raise DeadlineError("store is away")
        super().publish(weights)


@pytest.fixture
def agent() -> LinearAgent:
    return LinearAgent()


@pytest.fixture
def make(agent: LinearAgent):
    made: list[Publisher] = []

    def factory(sink, every_updates: int = 1, **kwargs) -> Publisher:
        made.append(Publisher(agent, sink, every_updates, **kwargs))
        return made[-1]

    yield factory
    for publisher in made:
        publisher.stop()


def test_versions_come_every_so_many_updates(agent: LinearAgent, make):
    store = MemoryWeights()
    publisher = make(store, every_updates=3)
    due = [publisher.after_update() for _ in range(7)]
    assert due == [False, False, True, False, False, True, False]
    publisher.flush(TIMEOUT)
    assert publisher.version == store.newest(0) == (1, 2)


def test_what_is_published_is_a_snapshot(agent: LinearAgent, make):
    store = SlowStore()
    publisher = make(store)
    agent.w = np.array([1.0, 2.0, 3.0])
    publisher.publish()
    agent.w += 100
    store.here.set()
    publisher.flush(TIMEOUT)
    np.testing.assert_array_equal(store.latest(NO_VERSION, 0).verify().arrays["w"], [1, 2, 3])


def test_training_does_not_wait_for_an_absent_store_and_the_newest_version_wins(agent: LinearAgent, make):
    store = SlowStore()
    publisher = make(store)
    for _ in range(200):
        agent.w += 1
        assert publisher.after_update()
    with pytest.raises(DeadlineError, match="not accepted"):
        publisher.flush(0.05)
    store.here.set()
    publisher.flush(TIMEOUT)
    assert store.newest(0) == (1, 200)
    assert store.latest(NO_VERSION, 0).arrays["w"][0] == 200
    assert len(store.offered) < 200


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_never_published(agent: LinearAgent, make, bad: float):
    store = MemoryWeights()
    publisher = make(store)
    agent.w[1] = bad
    assert not publisher.publish()
    agent.w[1] = 0
    assert publisher.publish()
    publisher.flush(TIMEOUT)
    assert store.newest(0) == (1, 1)


def test_a_resumed_publisher_takes_the_next_epoch(make):
    store = MemoryWeights()
    first = make(store)
    for _ in range(5):
        first.publish()
    first.flush(TIMEOUT)
    saved = {"epoch": 1, "counter": 2}
    second = make(store)
    second.load(saved)
    second.publish()
    second.flush(TIMEOUT)
    assert store.newest(0) == (2, 3)


def test_a_fresh_learner_claims_an_epoch_above_what_the_store_holds_and_fences_the_old_one(make):
    store = MemoryWeights()
    zombie = make(store)
    zombie.publish()
    zombie.flush(TIMEOUT)
    heir = make(store)
    heir.claim(TIMEOUT)
    heir.publish()
    heir.flush(TIMEOUT)
    assert store.newest(0) == (2, 1)
    zombie.publish()
    with pytest.raises(RejectedError, match="another learner"):
        zombie.flush(TIMEOUT)
    with pytest.raises(RejectedError, match="another learner"):
        zombie.publish()


def test_claiming_from_an_empty_store_keeps_the_epoch(make):
    publisher = make(MemoryWeights(), epoch=3)
    publisher.claim(TIMEOUT)
    assert publisher.version == (3, 0)


def test_a_store_that_lost_everything_gets_the_newest_version_again(make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("learner.publish.CHECK_SECONDS", 0.02)
    store = MemoryWeights()
    publisher = make(store)
    publisher.publish()
    publisher.flush(TIMEOUT)
    store.__init__()  # as after a restart
    assert store.newest(0) == NO_VERSION
    eventually(lambda: store.newest(0) == (1, 1))


def test_the_published_version_is_exported(agent: LinearAgent, make):
    metrics = Metrics("run", "learner")
    publisher = make(MemoryWeights(), metrics=metrics)
    publisher.publish()
    publisher.flush(TIMEOUT)
    assert metrics.value("learner_policy_version") == 1
