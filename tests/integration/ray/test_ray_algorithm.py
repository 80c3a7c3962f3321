"""One small run as an RLlib algorithm: train, lose an actor, save, restore, evaluate, go on."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.rllib.algorithms.algorithm import Algorithm

from deploy.algorithm import Dreamfleet, DreamfleetConfig
from deploy.run_dir import RunDirectory
from system.errors import ConfigError, IntegrityError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def algo(
    tmp_path_factory: pytest.TempPathFactory, small: tuple[str, ...], leaves_nothing: None
) -> Iterator[Dreamfleet]:
    root = tmp_path_factory.mktemp("algorithm")
    config = DreamfleetConfig().run(recipe="cartpole", assignments=[*small, f"root={root}"], step_seconds=0.2)
    algo = config.build_algo()
    assert isinstance(algo, Dreamfleet)
    train_until(algo, lambda r: r["updates"] >= 8 and r["env_runners"]["num_episodes_lifetime"])
    yield algo
    algo.stop()


@pytest.fixture(scope="module")
def ended(algo: Dreamfleet) -> Dreamfleet:
    """The same run, stopped: what follows needs no roles."""
    algo.stop()
    return algo


def train_until(algo: Dreamfleet, reached: Any, seconds: float = 90.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not reached(result := algo.train()):
        assert time.monotonic() < deadline, result
    return result


def returns(report: dict[str, Any]) -> list[float]:
    return report["env_runners"]["hist_stats"]["episode_reward"]


def test_train_advances_the_run_and_reports_in_rllibs_names(algo: Dreamfleet):
    iteration = algo.training_iteration
    result = algo.train()
    assert result["training_iteration"] == iteration + 1
    assert result["env_steps"] == result["num_env_steps_sampled_lifetime"]
    assert result["env_steps"] >= 64
    assert result["train_ratio"] > 0
    assert not math.isnan(result["env_runners"]["episode_return_mean"])
    assert result["learners"]["num_updates_lifetime"] == result["updates"]
    assert result["done"] is False


def test_no_experience_can_pass_the_driver(algo: Dreamfleet):
    """What the driver hears are counters; lists are the newest episodes' scores and the few alarms."""
    heard = {key: dict(s.payload) for key, s in algo.session.driver.fleet.statuses().items()}
    assert len(json.dumps(heard, default=float)) < 50_000
    assert {k for p in heard.values() for k, v in p.items() if isinstance(v, list)} == {"alarms", "episodes"}


def test_a_killed_actor_comes_back_in_its_next_life_and_the_run_goes_on(algo: Dreamfleet):
    driver = algo.session.driver
    before = driver.fleet.statuses()["actor-0"]
    steps = train_until(algo, lambda r: r["env_runners"]["num_healthy_workers"] == 1)["env_steps"]
    os.kill(before.pid, signal.SIGKILL)
    train_until(algo, lambda r: r["restarts"] == 1)
    train_until(algo, lambda r: r["env_runners"]["num_healthy_workers"] == 1 and r["env_steps"] > steps + 32)
    assert driver.fleet.statuses()["actor-0"].pid != before.pid
    assert json.loads(algo.run_dir.incarnations_file.read_text())["actor-0"] == 2
    lost = [json.loads(line) for line in (algo.run_dir.path / "events.jsonl").read_text().splitlines()]
    assert [e["role"] for e in lost if e["event"] == "role lost"] == ["actor-0"]


def test_saving_while_training_takes_the_newest_policy(algo: Dreamfleet, tmp_path: Path):
    at_least = algo.train()["updates"]
    path = Path(algo.save_to_path(tmp_path / "saved"))
    kept = list((path / "run" / "checkpoints").iterdir())
    assert len(kept) == 1
    assert int(kept[0].name.split("-")[1]) >= at_least
    assert not list(path.rglob("replay"))
    # The run is driven by `algo`, so this one may only look.
    restored = Dreamfleet.from_checkpoint(path)
    assert restored.training_iteration == algo.training_iteration
    assert len(returns(restored.evaluate())) == 4
    with pytest.raises(ConfigError, match="driven by another process"):
        restored.train()
    restored.stop()
    assert algo.train()["updates"] >= at_least


def test_evaluation_during_training_uses_the_policy_of_now(algo: Dreamfleet):
    updates = algo.train()["updates"]
    report = algo.evaluate()
    assert report["updates"] >= updates
    assert report["env_runners"]["num_episodes"] == 4
    assert report["env_runners"]["episode_return_mean"] == pytest.approx(sum(returns(report)) / 4)
    assert report["random_return_mean"] > 0


def test_a_restored_algorithm_plays_the_same_and_trains_on(ended: Dreamfleet, tmp_path: Path):
    path = ended.save_to_path(tmp_path / "final")
    played = returns(ended.evaluate())
    iteration, before = ended.training_iteration, ended.session.driver.progress

    by_base_class = Algorithm.from_checkpoint(path)
    assert isinstance(by_base_class, Dreamfleet)
    assert returns(by_base_class.evaluate()) == played
    by_base_class.stop()

    restored = Dreamfleet.from_checkpoint(path)
    assert returns(restored.evaluate()) == played
    try:
        result = train_until(restored, lambda r: r["updates"] > before.updates + 2)
    finally:
        restored.stop()
    assert result["training_iteration"] > iteration
    assert result["env_steps"] >= before.env_steps


def test_a_checkpoint_is_restored_into_another_run_with_its_replay(ended: Dreamfleet, tmp_path: Path):
    path = ended.save_to_path(tmp_path / "fork")
    settings = ended.run_config.model_copy(update={"root": tmp_path, "name": "fork"})
    forked = Dreamfleet.from_checkpoint(path, config=DreamfleetConfig().resolved(settings, {}))
    assert forked.run_dir.path == tmp_path / "fork"
    copied = {p.relative_to(forked.run_dir.path) for p in forked.run_dir.replay.rglob("*") if p.is_file()}
    assert copied == {
        p.relative_to(ended.run_dir.path) for p in ended.run_dir.replay.rglob("*") if p.is_file()
    }
    lives = ended.run_dir.incarnations_file.read_text()
    assert forked.run_dir.incarnations_file.read_text() == lives
    forked.stop()


def test_restoring_reads_no_pickle(ended: Dreamfleet, tmp_path: Path):
    path = Path(ended.save_to_path(tmp_path / "plain"))
    for pickled in path.glob("*.pkl"):
        pickled.unlink()
    restored = Dreamfleet.from_checkpoint(path)
    assert len(returns(restored.evaluate())) == 4
    restored.stop()


def test_a_tampered_or_foreign_checkpoint_is_refused(ended: Dreamfleet, tmp_path: Path):
    with pytest.raises(ConfigError, match="save_to_path"):
        Dreamfleet.from_checkpoint(tmp_path)
    path = Path(ended.save_to_path(tmp_path / "saved"))
    (arrays,) = path.glob("run/checkpoints/*/arrays.safetensors")
    content = bytearray(arrays.read_bytes())
    content[-1] ^= 1
    arrays.write_bytes(content)
    with pytest.raises(IntegrityError):
        Dreamfleet.from_checkpoint(path)
    (path / "dreamfleet.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"dreamfleet\.json"):
        Dreamfleet.from_checkpoint(path)


def test_an_algorithm_leaves_no_directory_of_rllibs(ended: Dreamfleet):
    assert ended.logdir == str(ended.run_dir.path)
    assert RunDirectory(Path(ended.logdir)).exists
    assert "tensorflow" not in sys.modules
