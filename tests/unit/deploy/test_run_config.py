"""Recipes compose into runs; impossible runs are refused before anything starts."""

import pytest

from deploy.run_config import compose, recipe_names
from system.errors import ConfigError


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_shipped_recipe_composes(recipe: str) -> None:
    config, _ = compose(recipe)
    assert config.name == f"{recipe}-0"
    assert config.prefill < config.env_steps


def test_the_run_name_follows_the_seed_unless_given() -> None:
    assert compose("cartpole", ["seed=4"])[0].name == "cartpole-4"
    assert compose("cartpole", ["seed=4", "name=mine"])[0].name == "mine"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cartpole'"):
        compose("cartpoel")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a" * 65, "a\nb"])
def test_run_names_cannot_leave_their_root(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        compose("cartpole", extra={"name": name})


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("replay.capacity=128", "learner.length"),
        ("replay.prefill=300000", "replay.prefill"),
        ("env_steps=500", "env_steps"),
        ("replay.train_ratio=0", "greater than 0"),
        ("learner.batch=0", "greater than or equal to 1"),
        ("backend=slurm", "ray"),
        ("learner.device=tpu", "learner.device = 'tpu' .* must be auto, cpu, cuda or cuda:<index>"),
    ],
)
def test_runs_that_could_never_train_are_refused(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose("cartpole", [assignment])


def test_capacity_counts_per_shard_because_an_actor_fills_only_its_own() -> None:
    small = ["actors.envs=8", "replay.capacity=1056"]  # 33 rows x 16 streams x 2
    assert compose("cartpole", [*small, "actors.count=2"])[0].shard_capacity == 528
    with pytest.raises(ConfigError, match="fullest shard"):
        compose("cartpole", [*small, "actors.count=4", "replay.shards=3"])  # 16 streams on shard 0
    with pytest.raises(ConfigError, match="fullest shard"):
        compose("cartpole", ["actors.envs=8", "replay.capacity=264", "actors.count=1"])  # shard 1 stays empty
