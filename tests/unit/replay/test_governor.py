"""The governor against a simulated fleet in fake time: shards die, return, lose rows, join and leave."""

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replay.governor import Governor, InsertTally, WaitBooks
from replay.limiter import RateLimiter
from system.errors import ConfigError, DeadlineError
from system.metrics import Metrics


@dataclass
class Shard:
    """A shard and its control: hears of grants when the wire delivers, inserts as far as it believes."""

    index: int
    inserted: int = 0
    waiting: int = 0
    alive: bool = True
    frozen: bool = False  # does not hear, may insert again when it thaws
    believes: int = 0
    ceiling: int = 0
    settled: bool = True
    failed: bool = False
    on_the_way: list[int] = field(default_factory=list)

    def grant(self, max_inserted: int) -> None:
        if self.failed:
            self.failed = False
            raise DeadlineError("no answer")
        self.on_the_way.append(max_inserted)
        self.ceiling = max(self.ceiling, max_inserted)
        self.settled = False

    def deliver(self) -> None:
        if not self.on_the_way:
            return
        newest = self.on_the_way[-1]
        self.on_the_way.clear()
        if self.alive and not self.frozen:
            self.believes = self.ceiling = newest
            self.settled = True
        else:
            self.failed = True

    def append(self, rows: int) -> int:
        count = min(rows, max(0, self.believes - self.inserted)) if self.alive and not self.frozen else 0
        self.inserted += count
        self.waiting = rows - count if self.alive else self.waiting
        return count


UPDATE = 64
RATIO = 4.0
SHARDS = st.integers(0, 5)


class FleetMachine(RuleBasedStateMachine):
    """Any order of events; after each, both sides are within the band and somebody can move."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.limiter = RateLimiter(RATIO, 100, 400, 10, paced=True)
        self.limiter.check_update(UPDATE)
        self.shards = {k: Shard(k) for k in range(3)}
        self.governor = Governor(self.limiter, list(self.shards.values()))
        self.doubt = 0  # credit of shards given up as dead that might still be used
        self.counted = 0  # rows inserted, by our own count
        self.newest = 2
        self.widest = 0
        self.step()

    def step(self, seconds: float = 0.01) -> None:
        self.now += seconds
        in_sight = [s for s in self.shards.values() if s.alive]
        rows = sum(s.inserted for s in self.shards.values())
        self.governor.observe(self.now, in_sight, rows, rows)
        self.governor.pump(self.now, at_once=True)
        for shard in self.shards.values():
            shard.deliver()
        self.widest = max(self.widest, self.limiter.band_rows)

    def insert(self, shard: Shard, rows: int) -> None:
        self.counted += shard.append(rows)

    @rule(k=SHARDS, rows=st.integers(1, 200))
    def append(self, k: int, rows: int) -> None:
        if k in self.shards:
            self.insert(self.shards[k], rows)
            self.step()

    @rule(times=st.integers(1, 20))
    def train(self, times: int) -> None:
        for _ in range(times):
            if self.limiter.can_train(UPDATE):
                self.limiter.record(UPDATE)
        self.step()

    @rule(k=SHARDS)
    def kill(self, k: int) -> None:
        if k in self.shards:
            self.shards[k].alive = False
            self.step()

    @rule(k=SHARDS)
    def restart(self, k: int) -> None:
        shard = self.shards.get(k)
        if shard and not shard.alive:
            shard.alive, shard.believes, shard.waiting = True, 0, 0
            self.step()

    @rule(k=SHARDS)
    def freeze(self, k: int) -> None:
        if k in self.shards:
            self.shards[k].frozen = True
            self.step()

    @rule(k=SHARDS)
    def thaw(self, k: int) -> None:
        shard = self.shards.get(k)
        if shard and shard.frozen:
            shard.frozen = False
            before = shard.inserted
            self.insert(shard, 1000)  # at once, before anybody can take its credit back
            self.doubt += shard.inserted - before
            self.step()

    @rule(k=SHARDS, rows=st.integers(1, 500))
    def lose_rows(self, k: int, rows: int) -> None:
        shard = self.shards.get(k)
        if shard and not shard.alive:
            shard.inserted = max(0, shard.inserted - rows)
            shard.alive, shard.believes, shard.waiting = True, 0, 0
            self.step()

    @precondition(lambda self: len(self.shards) < 5)
    @rule(rows=st.integers(0, 50))
    def join(self, rows: int) -> None:
        self.newest += 1
        k = self.newest
        self.shards[k] = Shard(k, inserted=rows)
        self.counted += rows
        self.doubt += rows  # nobody was asked for these
        self.governor.grants.join(k, self.shards[k])
        self.step()

    @precondition(lambda self: len(self.shards) > 2)
    @rule(k=SHARDS)
    def leave(self, k: int) -> None:
        if k in self.shards:
            self.governor.grants.leave(k)
            shard = self.shards[k]
            for _ in range(3):
                self.step()
            if shard.alive and not shard.frozen:
                assert shard.believes <= shard.inserted or shard.believes == shard.ceiling
                del self.shards[k]
            else:
                self.governor.grants.join(k, shard)

    @rule(seconds=st.sampled_from([0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        for _ in range(10):
            self.step(seconds / 10)

    @rule(ratio=st.sampled_from([1.0, 4.0, 16.0]))
    def new_ratio(self, ratio: float) -> None:
        ahead, prefilled, before = self.limiter.ahead_rows, self.limiter.prefilled, self.limiter.train_ratio
        self.limiter.request(train_ratio=ratio)
        it = self.limiter
        it.observe(it.inserted, it.live, it.starts)  # before a step fits the band to the traffic again
        if prefilled and ratio != before:
            band = self.limiter.band_rows
            assert self.limiter.ahead_rows == pytest.approx(min(max(ahead, -band), band))
        self.widest = max(self.widest, self.limiter.band_rows)
        self.step(0.0)

    @rule()
    def save_and_load(self) -> None:
        state = json.loads(json.dumps(self.governor.state()))
        error, ratio = self.limiter.error, self.limiter.train_ratio
        tolerance = self.limiter.tolerance_rows
        self.limiter = RateLimiter(ratio, 100, tolerance, 10, paced=True)
        self.limiter.check_update(UPDATE)
        self.governor = Governor(self.limiter, [])
        for k, shard in self.shards.items():
            self.governor.grants.join(k, shard)
        in_sight = [s for s in self.shards.values() if s.alive]
        rows = sum(s.inserted for s in self.shards.values())
        self.governor.observe(self.now, in_sight, rows, rows)
        self.governor.load(state)
        if rows:
            assert self.limiter.error == pytest.approx(error)
        self.step()

    @invariant()
    def every_inserted_row_is_counted_once(self) -> None:
        assert self.limiter.inserted <= self.counted
        if all(s.alive for s in self.shards.values()):
            self.step(0.0)
            assert self.limiter.inserted == self.counted

    @invariant()
    def both_sides_are_bounded(self) -> None:
        assert self.limiter.ahead_rows <= self.widest + self.doubt + 1
        if self.limiter.prefilled:
            assert self.limiter.ahead_rows >= -self.widest - 1

    @invariant()
    def somebody_can_move(self) -> None:
        if self.limiter.live >= 10 and self.limiter.prefilled:
            budget = self.limiter.insert_budget()
            assert self.limiter.can_train(UPDATE) or budget > self.limiter.inserted

    @invariant()
    def credit_is_not_promised_twice(self) -> None:
        if self.doubt == 0 and not any(s.frozen or not s.alive for s in self.shards.values()):
            unused = sum(max(0, s.believes - s.inserted) for s in self.shards.values())
            assert unused <= max(0, self.limiter.insert_budget() - self.limiter.inserted)

    def teardown(self) -> None:
        """Whatever happened: with all shards back, rows flow again and training goes on."""
        for shard in self.shards.values():
            shard.alive, shard.frozen = True, False
        trained = self.limiter.trained
        for _ in range(2000):
            for shard in self.shards.values():
                self.insert(shard, 20)
            self.step(0.05)
            if self.limiter.can_train(UPDATE):
                self.limiter.record(UPDATE)
            if self.limiter.trained >= trained + 10 * UPDATE:
                return
        raise AssertionError(f"stuck: {self.governor.report()}")


FleetMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFleet = FleetMachine.TestCase


@given(
    ratio=st.sampled_from([0.5, 4.0, 64.0]),
    update=st.sampled_from([64, 1024]),
    moves=st.lists(st.tuples(st.booleans(), st.integers(1, 300)), min_size=10, max_size=200),
    rates=st.lists(st.floats(0, 20_000), min_size=1, max_size=5),
)
def test_between_any_two_moments_the_ratio_is_off_by_at_most_the_band(
    ratio: float, update: int, moves: list[tuple[bool, int]], rates: list[float]
) -> None:
    """|M / I - ratio| / ratio <= 2 * band / I, for the widest band there was."""
    it = RateLimiter(ratio, 0, 1 << 20, 1, paced=True)
    it.check_update(update)
    inserted, marks, widest = 0, [(0, 0)], 0
    for number, (collect, amount) in enumerate(moves):
        it.pace(rates[number % len(rates)])
        widest = max(widest, it.band_rows)
        if collect:
            inserted += max(0, min(amount, it.insert_budget() - inserted))
        it.observe(inserted, inserted, inserted)
        for _ in range(0 if collect else amount % 8):
            if it.can_train(update):
                it.record(update)
        marks.append((inserted, it.trained))
    for begin, (rows_before, trained_before) in enumerate(marks):
        for rows_after, trained_after in marks[begin + 1 :]:
            rows, trained = rows_after - rows_before, trained_after - trained_before
            assert abs(trained - ratio * rows) <= ratio * (2 * widest + 1) + 1e-6


def test_the_band_of_a_paced_limiter_follows_the_traffic_within_its_bounds() -> None:
    it = RateLimiter(32.0, 0, 500, 1, paced=True)
    it.check_update(1024)
    assert it.band_rows == 17  # half an update is 16 rows
    it.pace(1000.0)
    assert it.band_rows == 150
    it.pace(1e6)
    assert it.band_rows == 500
    it.adjust(tolerance_rows=300)
    assert it.band_rows == 300
    it.pace(0.0)
    assert it.band_rows == 300


def test_a_change_that_would_deadlock_changes_nothing() -> None:
    it = RateLimiter(32.0, 0, 100, 1)
    it.check_update(1024)
    with pytest.raises(ConfigError, match="wait for each other"):
        it.request(train_ratio=1.0)
    it.observe(10, 10, 10)
    assert it.train_ratio == 32.0
    it.request(train_ratio=64.0)
    it.request(tolerance_rows=200)
    assert it.train_ratio == 32.0  # taken up by the owner's thread
    it.observe(10, 10, 10)
    assert (it.train_ratio, it.tolerance_rows) == (64.0, 200)


def test_the_ratio_held_counts_from_the_newest_change() -> None:
    it = RateLimiter(4.0, 100, 1000, 1)
    it.observe(300, 300, 300)
    it.record(720)
    it.adjust(train_ratio=16.0)
    it.observe(400, 400, 400)
    it.record(1600)
    assert it.held_ratio == 16.0
    it.load(json.loads(json.dumps(it.state())))
    assert it.held_ratio == 16.0


def test_a_shard_out_of_sight_keeps_its_rows_and_lost_rows_are_not_owed_again() -> None:
    tally = InsertTally()
    assert tally.count({0: 100, 1: 50}) == 150
    assert tally.count({0: 110}) == 160
    assert tally.count({0: 110, 1: 60}) == 170
    assert tally.count({0: 5, 1: 60}) == 170
    assert tally.count({0: 9, 1: 60, 2: 3}) == 177
    again = InsertTally()
    again.load(json.loads(json.dumps(tally.state())))
    assert again.count({0: 10, 1: 61, 2: 4}) == 180


def test_a_shard_that_has_not_answered_yet_neither_loses_nor_inserts_rows() -> None:
    near, far = Shard(0, inserted=1000), Shard(1, inserted=50_000)
    old = Governor(RateLimiter(RATIO, 100, 400, 10), [near, far])
    old.observe(0.0, [near, far], 2000, 2000)
    new = Governor(RateLimiter(RATIO, 100, 400, 10), [near, far])
    new.observe(0.0, [near, Shard(1)], 1000, 1000)
    new.load(json.loads(json.dumps(old.state())))
    assert new.limiter.inserted == 51_000
    far.inserted += 7
    new.observe(1.0, [near, far], 2000, 2000)
    assert new.limiter.inserted == 51_007


def test_seconds_are_booked_to_the_side_that_waited() -> None:
    books = WaitBooks()
    nobody, learner, actors = frozenset[str](), frozenset({"learner"}), frozenset({"actors"})
    for now, waiting in ((0.0, nobody), (1.0, learner), (3.0, learner), (4.0, nobody), (6.0, actors)):
        books.note(now, int(100 * now), int(400 * now), waiting)
    assert books.seconds == {"prefill": 0.0, "learner": 2.0, "actors": 1.0, "grants": 0.0}
    assert books.held_ratio() == pytest.approx(4.0)
    assert books.rate() == pytest.approx(100.0)
    assert books.shares()["learner"] == pytest.approx(2 / 6)


def test_status_and_metrics_say_who_waits_for_whom() -> None:
    metrics = Metrics("r", "learner")
    limiter = RateLimiter(4.0, 0, 100, 1)
    limiter.check_update(64)
    shard = Shard(0)
    governor = Governor(limiter, [shard], metrics=metrics)
    for second in range(10):
        shard.inserted, shard.waiting = 100, 20  # the budget is used up, appends wait
        governor.observe(float(second), [shard], 100, 100)
    assert "actors wait for the learner" in governor.line()
    for second in range(10, 60):
        shard.waiting = 0
        governor.observe(float(second), [shard], 100, 100, stalled=True)
    assert "the learner waits for actors" in governor.line()
    report = json.loads(json.dumps(governor.report()))
    assert report["seconds"]["actors"] == pytest.approx(9.5)
    assert metrics.value("learner_stall_seconds_total", side="learner") == pytest.approx(49.0)
    assert metrics.value("learner_stall_seconds_total", side="actors") == pytest.approx(9.5)
    assert metrics.value("learner_tolerance_rows") == 100
