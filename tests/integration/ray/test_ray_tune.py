"""Tune runs two trials side by side on two CPUs, each a whole run in its own directory."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray import tune

from deploy.algorithm import Dreamfleet, DreamfleetConfig
from deploy.ray_fleet import RayFleet
from deploy.ray_local import LocalRay
from deploy.roles import RoleSpec
from deploy.run_dir import RunDirectory
from system.errors import ConfigError, PreflightError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def space(small: tuple[str, ...]) -> dict[str, object]:
    return {
        "recipe": "cartpole",
        "assignments": [a for a in small if not a.startswith("actors.envs")],
        "actors.envs": tune.grid_search([1, 2]),
        "seed": 7,
        "step_seconds": 0.5,
    }


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, space: dict[str, object], leaves_nothing: None
) -> Iterator[tune.ResultGrid]:
    local = LocalRay(cpus=2)
    tuner = tune.Tuner(
        Dreamfleet,
        param_space=space,
        run_config=tune.RunConfig(
            name="two",
            storage_path=str(tmp_path_factory.mktemp("tune")),
            stop=lambda _trial, result: result["updates"] >= 4,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    )
    grid = tuner.fit()
    assert ray.is_initialized()  # ours to end, not the trials'
    yield grid
    local.close()


def test_two_trials_run_with_their_own_settings_and_directories(results: tune.ResultGrid):
    assert [r.error for r in results] == [None, None]
    runs = [RunDirectory(Path(r.path) / "run") for r in results]
    assert [run.config()["actors"]["envs"] for run in runs] == [1, 2]
    assert {run.config()["seed"] for run in runs} == {7}
    for result in results:
        assert result.metrics["updates"] >= 4
        assert result.metrics["env_steps"] >= 64


def test_trials_run_at_the_same_time(results: tune.ResultGrid):
    spans = []
    for result in results:
        lines = (Path(result.path) / "run" / "events.jsonl").read_text().splitlines()
        times = {e["event"]: e["time"] for e in map(json.loads, lines)}
        spans.append((times["run started"], times["run stopped"]))
    (start0, end0), (start1, end1) = spans
    assert max(start0, start1) < min(end0, end1)


def test_a_trials_checkpoint_is_an_algorithm_again(results: tune.ResultGrid):
    (result, _) = results
    assert result.checkpoint is not None
    algo = Dreamfleet.from_checkpoint(result.checkpoint)
    assert algo.training_iteration == result.metrics["training_iteration"]
    report = algo.evaluate()
    assert report["updates"] >= result.metrics["updates"]
    assert report["env_runners"]["num_episodes"] == 4
    algo.stop()


def test_a_learner_is_not_left_waiting_for_a_gpu_that_is_not_there(
    results: tune.ResultGrid, spec: Callable[..., RoleSpec], run_dir: RunDirectory
):
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    asked = spec("learner")
    asked = dataclasses.replace(
        asked, config={**asked.config, "learner": {"device": "cuda", "threads": 1, "ranks": 1}}
    )
    fleet = RayFleet(run_dir.path)
    with pytest.raises(PreflightError, match="needs 1 GPU"):
        fleet.launch(asked)
    fleet.close()
    assert ray.is_initialized()  # it was here before the fleet


def test_a_trial_books_what_its_roles_need(small: tuple[str, ...]):
    request = Dreamfleet.default_resource_request({"recipe": "cartpole", "assignments": list(small)})
    assert request.bundles == [{"CPU": 0.5}, {"CPU": 0.5}]
    gpu = DreamfleetConfig().run(recipe="cartpole", settings={"learner.device": "cuda", "actors.cpus": 2})
    assert Dreamfleet.default_resource_request(gpu).bundles == [
        {"CPU": 0.5, "GPU": 1},
        {"CPU": 2},
        {"CPU": 2},
    ]


def test_an_unknown_key_is_refused_with_its_name(small: tuple[str, ...]):
    with pytest.raises(ConfigError, match=r"actors\.cuont"):
        Dreamfleet.default_resource_request({"recipe": "cartpole", "actors.cuont": 3})
    with pytest.raises(ConfigError, match="envsteps"):
        DreamfleetConfig().update_from_dict({"recipe": "cartpole", "envsteps": 3})
    with pytest.raises(ConfigError, match="recipe"):
        DreamfleetConfig().build_algo()
