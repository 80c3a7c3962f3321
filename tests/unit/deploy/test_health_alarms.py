"""Alarms of the health monitor in a run directory: told once, closed by a restart, shown by status."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import assemble
from deploy.health import alarm_histories, settle, write_events
from deploy.run_config import RunConfig, compose
from deploy.run_dir import RunDirectory
from deploy.status import run_status
from learner.health.facts import ModelFacts
from learner.health.monitor import HealthMonitor
from learner.health.settings import HealthSettings
from replay.limiter import RateLimiter
from system.metrics import Metrics
from system.specs import ActionSpec, ArraySpec, EnvSpec

ENV = EnvSpec(
    name="envpool:CartPole-v1",
    obs={"obs": ArraySpec(shape=(4,), dtype="float32")},
    action=ActionSpec(kind="discrete", classes=(2,)),
)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return compose("cartpole", [f"root={tmp_path}", "name=r"])[0]


@pytest.fixture
def run_dir(config: RunConfig) -> RunDirectory:
    made = RunDirectory(config.directory)
    made.create().release()
    made.write_json(made.config_file, config.model_dump(mode="json"))
    return made


def exploding(run_dir: RunDirectory, monitor: HealthMonitor, values: Iterator[float], first: int = 1) -> None:
    for update, value in enumerate(values, first):
        write_events(run_dir, monitor.after_update(update, {"loss/dyn": value}))


def monitor() -> HealthMonitor:
    settings = HealthSettings(quiet_updates=0, window=1, patience=3)
    return HealthMonitor(settings, ModelFacts(kl_most=100.0))


def test_an_alarm_is_one_event_when_it_goes_on_and_one_when_it_goes_off(run_dir: RunDirectory) -> None:
    exploding(run_dir, monitor(), iter([60.0] * 10 + [3.0] * 10))
    on, off = run_dir.events()
    assert (on["event"], on["alarm"], on["since_update"]) == ("health alarm", "kl_explosion", 3)
    assert (on["value"], on["limit"]) == (60.0, 50.0)
    assert on["cause"]
    assert on["remedy"]
    assert (off["event"], off["alarm"], off["update"]) == ("health alarm cleared", "kl_explosion", 13)


def test_status_shows_alarms_that_are_on_first_and_those_that_were(run_dir: RunDirectory) -> None:
    judge = monitor()
    exploding(run_dir, judge, iter([60.0] * 5 + [3.0] * 5 + [70.0] * 5))
    write_events(run_dir, judge.after_nonfinite(15, "input reward (1 entries)", 1))
    exploding(run_dir, judge, iter([3.0] * 5), first=16)
    nonfinite, explosion = run_status(run_dir.path).alarms[::-1]
    assert (explosion.alarm, explosion.on, explosion.times) == ("kl_explosion", False, 2)
    assert (explosion.first_update, explosion.last_update) == (3, 13)
    text = run_status(run_dir.path).text()
    assert "was raised: kl_explosion since update 13, 2 times: 70, limit 50" in text
    assert not nonfinite.on
    write_events(run_dir, judge.after_nonfinite(21, "input reward (1 entries)", 1))
    first = run_status(run_dir.path).alarms[0]
    assert (first.alarm, first.on) == ("nonfinite", True)
    assert "ALARM nonfinite since update 21, 2 times: 1, limit 0 (input reward (1 entries));" in first.text()
    assert run_status(run_dir.path).to_dict()["alarms"][0]["remedy"] == first.remedy


def test_a_restarted_learner_closes_what_it_does_not_know_of(run_dir: RunDirectory) -> None:
    judge = monitor()
    exploding(run_dir, judge, iter([60.0] * 5))
    settle(run_dir, (raised.alarm for raised in judge.active), 5)  # it resumed with the alarm: nothing to say
    assert len(list(run_dir.events())) == 1
    settle(run_dir, (), 2)
    assert [history.on for history in alarm_histories(run_dir)] == [False]
    *_, last = run_dir.events()
    assert last["reason"] == "learner restarted"
    settle(run_dir, (), 2)
    assert len(list(run_dir.events())) == 2


class Reader:
    """As much of a reader as keeps the books."""

    def __init__(self, limiter: RateLimiter) -> None:
        self.limiter = limiter


def test_books_of_the_runs_own_limiter_are_judged(config: RunConfig) -> None:
    limiter, metrics = assemble.rate_limiter(config), Metrics("r", "learner")
    limiter.check_update(config.batch_rows)
    watch = assemble.health_watch(config, ENV, None, Reader(limiter), metrics)  # type: ignore[arg-type]
    events = []
    for _ in range(3000):
        rows = min(limiter.inserted + 8, limiter.insert_budget())
        limiter.observe(rows, rows, rows)
        if limiter.can_train(config.batch_rows):
            limiter.record(config.batch_rows)
        events += watch.while_waiting(0)
    assert limiter.inserted > 20_000
    assert events == [], "the limiter keeps its word"
    for _ in range(200):
        limiter.record(config.batch_rows)  # by somebody who did not ask
        events += watch.while_waiting(0)
    assert [(event.kind, event.raised.alarm) for event in events] == [("raised", "ratio_drift")]
    assert metrics.value("learner_health", alarm="ratio_drift") == 1.0


def test_planned_updates_follow_from_the_recipe(config: RunConfig) -> None:
    assert config.planned_updates == pytest.approx((24000 - 1024) * 64 / 512)
    few = compose("cartpole", ["updates=10"])[0]
    assert few.planned_updates == 10
