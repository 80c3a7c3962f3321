"""The replay section: defaults change nothing, contradictions are refused with what to do."""

from dataclasses import replace

import pytest

from deploy import assemble
from deploy.replay_config import ReplayConfig
from deploy.run_config import compose
from replay.selection import Sampling
from system.errors import ConfigError
from system.specs import ActionSpec, ArraySpec, EnvSpec


def test_by_default_every_row_is_kept_raw_and_drawn_uniformly() -> None:
    replay = ReplayConfig()
    assert replay.sampling.shares == {"uniform": 1.0}
    assert (replay.resume, replay.durability, replay.compress, replay.far) == ("keep", "process", "off", None)
    assert (replay.capacity_bytes, replay.max_age_seconds, replay.sources) == (None, None, {})


def test_shares_and_sources_come_from_the_command_line() -> None:
    settings = [
        "replay.sampling={uniform: 0.5, online: 0.25, prioritized: 0.25}",
        "replay.priority.signal=model",
        "replay.sources.expert.path=/data/expert",
        "replay.sources.expert.weight=0.5",
    ]
    replay = compose("cartpole", settings)[0].replay
    assert replay.sampling.shares == {"uniform": 0.5, "online": 0.25, "prioritized": 0.25}
    assert replay.sources["expert"].weight == 0.5


def test_selectors_are_made_as_configured() -> None:
    assert assemble.sampling(compose("cartpole")[0]) == Sampling()
    settings = [
        "replay.sampling={recency: 1, online: 1, prioritized: 1, recency_power: 5, online_backlog: 100}",
        "replay.priority={signal: value, exponent: 0.5, importance: 0.25, half_life: 900}",
    ]
    made = assemble.sampling(compose("cartpole", settings)[0])
    assert made.shares == {"uniform": 1.0, "online": 1.0, "recency": 1.0, "prioritized": 1.0}
    assert (made.recency, made.backlog) == (5.0, 100)
    assert (made.exponent, made.importance, made.half_life) == (0.5, 0.25, 900.0)


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["replay.sampling.uniform=0"], "replay.sampling"),
        (["replay.sampling.prioritised=1"], "did you mean replay.sampling.prioritized"),
        (["replay.sampling.prioritized=1"], "replay.priority.signal"),
        (["replay.priority.signal=value"], "replay.sampling.prioritized"),
        (["replay.sampling.recency_power=0.5"], "greater than or equal to 1"),
        (["replay.sampling.online_backlog=0"], "greater than or equal to 1"),
        (["replay.priority.half_life=-1"], "greater than or equal to 0"),
        (["replay.priority.half_life=.inf"], "finite"),
        (["replay.own_weight=0"], "replay.sources"),
        (["replay.sources={'../x': {path: a}}"], "must match"),
        (["replay.sources.x.weight=0", "replay.sources.x.path=a"], "greater than 0"),
        (["replay.resume=yes"], "keep"),
        (["replay.compress=auto", "replay.far='s3://b/p'", "replay.far_after=1"], "replay.far_after"),
        (["replay.capacity_bytes=10"], "greater than or equal to"),
    ],
)
def test_contradictions_are_refused(assignments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose("cartpole", assignments)


def test_added_keys_get_the_defaults_that_were_said() -> None:
    config, _ = compose("cartpole", ["replay.evolve=true", "replay.defaults.goal=-1.5"])
    obs = {key: ArraySpec(shape=(4,), dtype="float32") for key in ("vector", "goal")}
    env_spec = EnvSpec(name="test", obs=obs, action=ActionSpec(kind="discrete", classes=(2,)))
    table = assemble.table_spec(config, env_spec)
    assert (table.columns["goal"].default, table.columns["vector"].default) == (-1.5, None)
    with pytest.raises(ConfigError, match=r"\['goal'\] that test does not show"):
        assemble.table_spec(config, replace(env_spec, obs={"vector": obs["vector"]}))
