"""Every adapter passes the kit that users run on their own environments, and the kit finds real faults."""

import pytest

from actors.conformance import check_env
from actors.envs.toy import CounterEnv

SOUND = [
    ("envpool:CartPole-v1", {}),
    ("envpool:CartPole-v1", {"batch_size": 2}),
    ("envpool:Pendulum-v1", {"action_repeat": 2}),
    ("envpool:MiniGrid-Empty-5x5-v0", {}),
    ("gym:CartPole-v1", {}),
    ("gym:CartPole-v1", {"autoreset": "same_step"}),
    ("gym:CartPole-v1", {"autoreset": "disabled"}),
    ("gym:CartPole-v1", {"vectorization": "native"}),
    ("gym:CartPole-v1", {"vectorization": "async"}),
    ("gym:Pendulum-v1", {}),
    ("gym:MiniGrid-Empty-5x5-v0", {}),
    ("toy:counter", {}),
    ("toy:counter", {"batch_size": 1}),
    ("actors.envs.example_env:make", {}),
]


@pytest.mark.parametrize(("name", "options"), SOUND)
def test_a_sound_environment_passes_every_rule(name, options):
    findings = check_env(name, options, rows=250, max_seconds=20.0)
    assert [f for f in findings if f.level != "ok"] == []
    rules = {f.rule for f in findings}
    assert rules == {"builds", "rows", "episodes", "speed", "refuses bad actions", "determinism"}


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("crash", "crash"),
        ("nan", "non_finite"),
        ("shape", "malformed"),
        ("dtype", "malformed"),
        ("flags", "malformed"),
        ("hang", "answers in time"),
    ],
)
def test_the_kit_names_a_fault_that_does_not_stop(fault, rule):
    options = {"fault": fault, "times": 1000, "max_restarts": 2}
    findings = check_env("toy:faulty", options, rows=50, timeout=0.01)
    worst = findings[-1]
    assert (worst.level, worst.rule) == ("error", rule)
    assert worst.remedy


def test_a_fault_that_passes_is_a_warning():
    levels = {f.rule: f.level for f in check_env("toy:faulty", {"fault": "crash"}, rows=50)}
    assert levels["stable"] == "warning"


def test_an_unknown_environment_is_one_finding():
    (finding,) = check_env("gym:NoSuchThing-v0")
    assert (finding.level, finding.rule) == ("error", "builds")


class Careless(CounterEnv):
    """Takes any action and forgets is_first after the first episode."""

    def send(self, action, env_id):
        n = len(env_id)
        super().send(action[:n] * 0, env_id)


class Forgetful(CounterEnv):
    def recv(self, timeout):
        step = super().recv(timeout)
        if self._episode.max() > 0:
            step.is_first[:] = False
        return step


class Moody(CounterEnv):
    lives = 0

    def start(self, seed):
        Moody.lives += 1
        super().start(seed + Moody.lives)


def test_the_kit_catches_an_environment_that_takes_bad_actions():
    findings = {f.rule: f for f in check_env(Careless, rows=50)}
    assert findings["refuses bad actions"].level == "error"
    assert "outside" in findings["refuses bad actions"].detail


def test_the_kit_catches_a_missing_is_first():
    findings = {f.rule: f.level for f in check_env(Forgetful, rows=50)}
    assert findings["is_first"] == "error"


def test_the_kit_catches_other_rows_for_the_same_seed():
    findings = {f.rule: f.level for f in check_env(Moody, rows=50)}
    assert findings["determinism"] == "warning"


def test_the_kit_warns_when_no_episode_ends():
    findings = {f.rule: f.level for f in check_env("envpool:Pendulum-v1", rows=20)}
    assert findings["episodes"] == "warning"
