"""The pure monitor on given figures: patience, clearing, what is not judged, state; the ratio's window."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learner.health.alarms import ALARMS
from learner.health.facts import ModelFacts
from learner.health.monitor import HealthMonitor
from learner.health.nonfinite import nonfinite_source
from learner.health.ratio import RatioBooks, RatioWindow
from learner.health.readings import RULES
from learner.health.settings import HealthSettings
from replay.limiter import RateLimiter

FACTS = ModelFacts(
    free_nats=1.0,
    kl_most=100.0,
    entropy_most=1.0,
    return_most=1e8,
    discount_horizon=333.0,
    lr=1e-3,
    loss_modules={"dyn": "rssm", "obs": "decoder", "reward": "reward", "policy": "actor"},
)
HEALTHY = {
    "loss/dyn": 3.0,
    "entropy/marginal": 20.0,
    "entropy/posterior": 10.0,
    "imagined/return": 5.0,
    "imagined/value": 5.0,
    "imagined/return_scale": 4.0,
    "entropy/policy": 0.4,
    "imagined/reward": 0.5,
    "replayed/reward": 0.4,
    "replayed/reward_std": 0.3,
    "replayed/value": 5.0,
    "replayed/return": 6.0,
    "replayed/return_std": 2.0,
    "grad_norm": 10.0,
    "grad_norm/encoder": 3.0,
    "grad_norm/actor": 0.1,
    "lr": 1e-3,
}
SICK = {
    "kl_collapse": {"loss/dyn": 1.0, "entropy/marginal": 10.05},
    "kl_explosion": {"loss/dyn": 60.0},
    "return_saturated": {"imagined/value": -2e7},
    "return_flat": {"replayed/reward_std": 1e-5, "imagined/return_scale": 1.0},
    "entropy_collapse": {"entropy/policy": 0.001},
    "entropy_maximum": {"entropy/policy": 0.999},
    "reward_mismatch": {"imagined/reward": 2.0},
    "value_mismatch": {"replayed/value": 12.0},
    "gradient_explosion": {"grad_norm": 1e5, "grad_norm/encoder": 1e5},
    "gradient_vanishing": {"grad_norm/actor": 0.0},
    "learning_rate": {"lr": 1e-5},
}
QUICK = HealthSettings(quiet_updates=5, window=4, patience=6, long_patience=9)


def monitor(limits: HealthSettings = QUICK, facts: ModelFacts = FACTS) -> HealthMonitor:
    made = HealthMonitor(limits, facts)
    assert said(made, 60, {}) == []
    return made


def said(
    made: HealthMonitor, updates: int, change: dict[str, float], first: int = 1
) -> list[tuple[str, str]]:
    """Kind and alarm of every event in so many updates of healthy figures with that change."""
    values = HEALTHY | change
    events = [event for u in range(updates) for event in made.after_update(first + u, values)]
    return [(event.kind, event.raised.alarm) for event in events]


def test_every_rule_has_its_sick_figures() -> None:
    assert SICK.keys() == RULES.keys()


@pytest.mark.parametrize("name", SICK)
def test_alarm_goes_on_once_and_off_once(name: str) -> None:
    made = monitor()
    assert said(made, 48, SICK[name]) == [("raised", name)]
    assert [raised.alarm for raised in made.active] == [name]
    assert said(made, 300, {}) == [("cleared", name)]
    assert made.active == ()


@pytest.mark.parametrize("name", SICK.keys() - {"learning_rate"})
def test_a_short_trouble_is_no_alarm(name: str) -> None:
    made = monitor(HealthSettings(quiet_updates=5, window=1, patience=6, long_patience=6))
    for _ in range(20):
        assert said(made, 5, SICK[name]) == []
        assert said(made, 1, {}) == []


@pytest.mark.parametrize("name", SICK.keys() - {"learning_rate"})
def test_nothing_is_raised_in_the_first_updates_and_in_the_warmup(name: str) -> None:
    sick = HEALTHY | SICK[name]
    made = HealthMonitor(QUICK, ModelFacts(**{**vars_of(FACTS), "warmup": 20}))
    events = [event for u in range(1, 60) for event in made.after_update(u, sick)]
    started = [event.update for event in events if event.raised.alarm == name]
    assert all(update > 25 for update in started)
    assert bool(started) == (name != "gradient_explosion"), "what was never small did not grow"


def vars_of(facts: ModelFacts) -> dict[str, object]:
    return {name: getattr(facts, name) for name in facts.__slots__}


def test_a_value_between_limit_and_margin_changes_nothing() -> None:
    made = monitor()
    assert said(made, 50, SICK["kl_explosion"]) == [("raised", "kl_explosion")]
    assert said(made, 200, {"loss/dyn": 45.0}) == []  # below the limit of 50, not yet below 40
    assert said(made, 200, {"loss/dyn": 35.0}) == [("cleared", "kl_explosion")]


@pytest.mark.parametrize("name", SICK)
def test_a_family_that_does_not_report_a_figure_is_not_judged_by_it(name: str) -> None:
    made = HealthMonitor(QUICK, FACTS)
    values = {key: value for key, value in (HEALTHY | SICK[name]).items() if key not in SICK[name]}
    assert [e for u in range(1, 80) for e in made.after_update(u, values) if e.raised.alarm == name] == []


def test_values_that_are_not_finite_leave_the_averages_alone() -> None:
    made = monitor()
    assert said(made, 50, dict.fromkeys(HEALTHY, math.nan)) == []
    assert said(made, 50, {}) == []


@settings(max_examples=60)
@example([("grad_norm/actor", 1.7976931348622105e308)])
@given(st.lists(st.tuples(st.sampled_from(sorted(HEALTHY)), st.floats()), max_size=30))
def test_any_figures_are_taken_and_can_be_stored(odd: list[tuple[str, float]]) -> None:
    made = HealthMonitor(HealthSettings(quiet_updates=0, window=1, patience=1, long_patience=1), FACTS)
    for update, (name, value) in enumerate(odd, 1):
        for event in made.after_update(update, HEALTHY | {name: value}):
            assert math.isfinite(event.raised.limit)
    again = HealthMonitor(QUICK, FACTS)
    again.load(json.loads(json.dumps(made.state())))
    assert again.state() == made.state()
    assert again.active == made.active


def test_critic_that_runs_after_growing_returns_is_healthy_and_one_that_stands_still_is_not() -> None:
    made = HealthMonitor(QUICK, FACTS)
    growing = [
        {"replayed/return": 90 * (1 - math.exp(-u / 50)), "replayed/value": 90 * (1 - math.exp(-u / 200))}
        for u in range(150)
    ]
    assert growing[80]["replayed/value"] < 0.5 * growing[80]["replayed/return"]
    assert [e for u, figures in enumerate(growing) for e in made.after_update(u, HEALTHY | figures)] == []
    stands = {"replayed/return": 90.0, "replayed/value": 20.0}
    assert said(made, 400, stands) == [("raised", "value_mismatch")]


def test_model_that_beats_copying_may_get_worse_twice_before_it_is_drift() -> None:
    made = HealthMonitor(HealthSettings(probe_patience=2), FACTS)
    said = [made.after_probe(u, ratio) for u, ratio in enumerate([0.9] + 20 * [0.6] + 20 * [0.99])]
    assert not any(said), "worse, but still better than copying"
    events = [event for u in range(60) for event in made.after_probe(100 + u, 1.8)]
    assert [event.raised.alarm for event in events] == ["imagination_drift"]
    events = [event for u in range(60) for event in made.after_probe(200 + u, 0.7)]
    assert [event.kind for event in events] == ["cleared"]


def test_model_that_never_beat_copying_has_time_to_learn() -> None:
    made = HealthMonitor(HealthSettings(probe_patience=2, drift_updates=1000), FACTS)
    events = [event for u in range(0, 3000, 100) for event in made.after_probe(u, 1.5)]
    assert [(event.kind, event.update) for event in events] == [("raised", 1200)]


def books(inserted: int, trained: int, asked: float = 4.0, band: int = 10) -> RatioBooks:
    return RatioBooks(inserted=inserted, trained=trained, asked=asked, band_rows=band)


def test_ratio_of_a_real_limiter_is_held_whatever_the_order() -> None:
    limiter = RateLimiter(4.0, 100, 50, 10)
    window, told = RatioWindow(1000, 0.1, 0.2), []
    limiter.observe(100, 100, 100)
    for step in range(3000):
        if limiter.can_train(64) and step % 7 < 5:
            limiter.record(64)
        else:
            limiter.observe(min(limiter.inserted + 9, limiter.insert_budget()), 1000, 1000)
        told.append(window.read(books(limiter.inserted, limiter.trained, band=limiter.band_rows)))
    readings = [reading for reading in told if reading is not None]
    assert len(readings) > 500
    assert max(reading.value for reading in readings) < 0.1
    assert not any(reading.broken for reading in readings)


def test_learner_that_makes_up_for_lost_updates_does_not_drift() -> None:
    """It resumed from an older checkpoint: rows are counted by the shards, its updates are gone."""
    limiter, made = RateLimiter(4.0, 100, 50, 10), HealthMonitor(QUICK, FACTS)
    limiter.observe(10_000, 5000, 5000)
    limiter.record(64 * 100)  # of 39,600 that are due
    events = []
    for step in range(4000):
        if limiter.can_train(64):
            limiter.record(64)
        elif limiter.insert_budget() > limiter.inserted:
            limiter.observe(min(limiter.inserted + 9, limiter.insert_budget()), 1000, 1000)
        counted = books(limiter.inserted, limiter.trained, band=limiter.band_rows)
        events += made.after_rows(step, replace(counted, owed=limiter.error))
    assert limiter.error < 400
    assert events == []
    assert made.values["ratio_drift"] < 0.1
    for step in range(400):  # nothing is due any more, and it trains on
        limiter.record(64)
        counted = books(limiter.inserted, limiter.trained, band=limiter.band_rows)
        events += made.after_rows(step, replace(counted, owed=limiter.error))
    assert [event.raised.alarm for event in events] == ["ratio_drift"]


@pytest.mark.parametrize(("per_row", "error"), [(3.0, 0.25), (6.0, 1.0 / 3.0), (0.0, 1.0)])
def test_ratio_that_is_not_held_is_raised_with_its_error(per_row: float, error: float) -> None:
    made = HealthMonitor(QUICK, FACTS)
    events = [e for n in range(0, 9000, 20) for e in made.after_rows(1, books(n, int(per_row * n)))]
    assert [(event.kind, event.raised.alarm) for event in events] == [("raised", "ratio_drift")]
    assert events[0].raised.value == pytest.approx(error, abs=0.02)
    assert "4 asked for each" in events[0].raised.detail


def test_training_on_while_nothing_is_inserted_is_drift_too() -> None:
    made = HealthMonitor(QUICK, FACTS)
    events = [event for n in range(200) for event in made.after_rows(n, books(500, 64 * n))]
    assert [event.raised.alarm for event in events] == ["ratio_drift"]


def test_a_new_ratio_begins_a_new_window() -> None:
    window = RatioWindow(1000, 0.1, 0.2)
    assert [window.read(books(n, 4 * n)) for n in range(0, 1500, 50)][-1] is not None
    told = [window.read(books(1500 + n, 6000 + 8 * n, asked=8.0)) for n in range(0, 1500, 50)]
    assert told[:19] == [None] * 19
    assert told[-1] is not None
    assert not told[-1].broken


def test_a_wide_band_is_judged_over_more_rows() -> None:
    window = RatioWindow(1000, 0.1, 0.2)
    told = [window.read(books(n, 4 * n, band=500)) for n in range(0, 30_000, 100)]
    assert told.index(next(reading for reading in told if reading is not None)) == 200


@pytest.mark.parametrize(
    ("values", "weights", "source"),
    [
        ({"input/reward": 2.0, "loss/dyn": math.nan}, {"rssm": 1.0}, "input reward (2 entries)"),
        ({"input/reward": 0.0, "loss/dyn": math.nan}, {"rssm": math.inf}, "weights of rssm"),
        (
            {"loss/reward": math.inf, "loss/obs/front": math.nan, "loss/total": math.nan},
            {},
            "loss obs/front of decoder; also reward",
        ),
        (
            {
                "loss/total": 1.0,
                "grad_norm/rssm": math.nan,
                "grad_norm/reward": math.inf,
                "grad_norm": math.nan,
            },
            {},
            "gradient of reward; also rssm",
        ),
        ({"loss/total": math.nan}, {"rssm": 1.0}, "an unnamed loss or gradient"),
    ],
)
def test_source_is_what_comes_first_in_the_flow_of_data(
    values: dict[str, float], weights: dict[str, float], source: str
) -> None:
    assert nonfinite_source(values, weights, FACTS) == source


def test_alarms_are_told_apart() -> None:
    assert len({alarm.name for alarm in ALARMS}) == len(ALARMS)
    assert len({alarm.cause for alarm in ALARMS}) == len(ALARMS)
