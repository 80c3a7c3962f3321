import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.limiter import RateLimiter
from system.errors import ConfigError


def limiter(ratio: float = 4.0, prefill: int = 100, tolerance: int = 50, least: int = 10) -> RateLimiter:
    return RateLimiter(ratio, prefill, tolerance, least)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((0.0, 100, 50, 10), "train_ratio"),
        ((float("nan"), 100, 50, 10), "train_ratio"),
        ((4.0, -1, 50, 10), "prefill_rows"),
        ((4.0, 100, 0, 10), "tolerance_rows"),
        ((4.0, 100, 50, 151), "min_rows .151. must be <= prefill_rows .100. \\+ tolerance_rows"),
    ],
)
def test_impossible_settings_are_refused(values: tuple[float, int, int, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RateLimiter(*values)


def test_a_batch_too_large_for_the_band_is_refused_with_the_remedy() -> None:
    limiter(1.0, tolerance=50).check_update(99)
    with pytest.raises(ConfigError, match="raise tolerance_rows to 51 or more"):
        limiter(1.0, tolerance=50).check_update(100)


def test_training_waits_for_the_prefill_then_for_the_band() -> None:
    it = limiter()
    it.observe(99, 99, 50)
    assert not it.can_train(1)
    it.observe(100, 100, 50)
    assert it.can_train(200)  # error 0, band 4 * 50
    assert not it.can_train(201)


def test_the_insert_budget_follows_training() -> None:
    it = limiter()
    it.observe(150, 150, 90)
    assert it.insert_budget() == 150
    it.record(8)
    assert it.insert_budget() == 152


def test_the_prefill_goes_on_while_no_sequence_can_start() -> None:
    it = limiter()
    it.observe(150, 150, 0)
    assert not it.can_train(1)
    assert it.insert_budget() == 200


def test_lost_rows_may_be_collected_again_up_to_min_rows() -> None:
    it = limiter(least=60)
    it.observe(150, 20, 5)
    assert it.insert_budget() == 190


@given(
    ratio=st.floats(0.01, 2000),
    prefill=st.integers(0, 500),
    update=st.integers(1, 4096),
    slack=st.integers(0, 100),
    insert_first=st.booleans(),
    chunk=st.integers(1, 64),
)
def test_both_sides_stay_in_the_band_and_never_both_wait(
    ratio: float, prefill: int, update: int, slack: int, insert_first: bool, chunk: int
) -> None:
    tolerance = int((update / ratio + 1) / 2) + 1 + slack
    it = RateLimiter(ratio, prefill, tolerance, 1)
    it.check_update(update)
    inserted = 0
    for _ in range(300):
        it.observe(inserted, inserted, inserted)
        may_train, may_insert = it.can_train(update), it.insert_budget() > inserted
        assert may_train or may_insert
        if may_insert and (insert_first or not may_train):
            inserted += min(chunk, it.insert_budget() - inserted)
        else:
            it.record(update)
        it.observe(inserted, inserted, inserted)
        if it.prefilled and it.trained:
            assert abs(it.error) <= ratio * (tolerance + 1) + 1e-3
    if it.prefilled and inserted > prefill + 100 * tolerance:
        assert it.held_ratio == pytest.approx(ratio, rel=0.02)


@given(
    before=st.integers(100, 10_000),
    trained=st.integers(0, 40_000),
    after=st.integers(0, 20_000),
    ratio=st.sampled_from([1.0, 4.0, 64.0]),
)
def test_a_loaded_ledger_never_stops_both_sides(before: int, trained: int, after: int, ratio: float) -> None:
    """Whatever rows were lost or gained between save and load, and whatever was set anew."""
    old = limiter()
    old.observe(before, before, before)
    old.record(trained)
    it = limiter(ratio, tolerance=200)
    it.observe(after, after, after)
    it.load(json.loads(json.dumps(old.state())))
    assert it.trained == trained
    inserted = after
    for _ in range(20_000):
        it.observe(inserted, inserted, inserted)
        if it.can_train(64):
            break
        assert it.insert_budget() > inserted
        inserted = it.insert_budget()
        it.observe(inserted, inserted, inserted)
    else:
        pytest.fail("training never began")


def test_a_ledger_loaded_beside_the_same_rows_is_the_same() -> None:
    old, new = limiter(), limiter()
    old.observe(500, 400, 300)
    old.record(1000)
    new.observe(500, 400, 300)
    new.load(old.state())
    assert (new.error, new.insert_budget(), new.trained) == (old.error, old.insert_budget(), 1000)


def test_rows_newer_than_the_save_are_owed() -> None:
    old, new = limiter(), limiter()
    old.observe(500, 400, 300)
    new.observe(700, 400, 300)
    new.load(old.state())
    assert new.error == old.error + 4 * 200


def test_a_lost_replay_is_prefilled_again_and_then_trained_at_once() -> None:
    old, new = limiter(), limiter()
    old.observe(100_000, 5000, 4000)
    old.record(399_600)
    new.observe(0, 0, 0)
    new.load(old.state())
    assert new.insert_budget() == 150
    new.observe(100, 100, 50)
    assert new.can_train(64)
    assert new.trained == 399_600


def test_rows_that_nobody_looked_at_yet_are_no_lost_replay() -> None:
    old, new = limiter(), limiter()
    old.observe(1000, 1000, 1000)
    old.record(3600)
    new.observe(1000, 0, 0)
    new.load(old.state(), unseen=True)
    assert (new.error, new.prefilled) == (0.0, True)


def test_a_ledger_restarted_while_training_is_ahead_has_had_its_prefill() -> None:
    it = limiter()
    it.observe(1000, 1000, 1000)
    it.record(3700)
    it.adjust(train_ratio=8.0)
    assert it.error == -200.0
    assert it.prefilled
    assert it.can_train(64)
    longer = limiter(8.0, prefill=900)
    longer.observe(1000, 1000, 1000)
    longer.load(json.loads(json.dumps(it.state())))
    assert (longer.error, longer.prefilled) == (-200.0, True)


def test_a_prefill_goes_on_where_rows_of_it_were_lost() -> None:
    old, new = limiter(), limiter()
    old.observe(60, 60, 60)
    new.observe(30, 30, 30)
    new.load(old.state())
    new.observe(69, 69, 69)
    assert not new.prefilled
    new.observe(70, 70, 70)
    assert new.prefilled


def test_changing_the_ratio_keeps_what_is_owed_and_forgets_nothing_else() -> None:
    it = limiter()
    it.observe(300, 300, 200)
    it.record(720)  # owes 80 trained rows = 20 inserted rows
    it.adjust(train_ratio=64.0)
    assert it.error == pytest.approx(64 * 20)
    assert it.trained == 720
    with pytest.raises(ConfigError):
        it.adjust(tolerance_rows=0)
