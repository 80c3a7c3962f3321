"""Exact mode goes the same way twice; what does not is found and named."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import determinism
from bench.determinism import compare, trace
from bench.learner import CASES
from learner.catalog import make_config
from system.errors import IntegrityError

SMALL = {
    "size": "nano",
    "deter": 16,
    "hidden": 8,
    "units": 8,
    "stoch": 4,
    "classes": 4,
    "blocks": 4,
    "bins": 15,
    "horizon": 3,
    "warmup": 2,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(root: Path, *, seed: int, updates: int = 10) -> list[dict[str, str]]:
    config = make_config("dreamer", SMALL)
    return list(trace(config, CASES["vector"], updates=updates, seed=seed, device="cpu", root=root))


def test_two_runs_with_one_seed_are_identical_in_every_part(tmp_path: Path):
    one, other = run(tmp_path / "one", seed=3), run(tmp_path / "other", seed=3)
    assert compare([one, other]) == (10, [])
    assert set(one[0]) == {"losses", "parameters", "slow", "optimiser", "returns", "rng"}
    assert len({digests["parameters"] for digests in one}) == 10  # every update but the first changes them


def test_another_seed_differs_from_the_first_update_on(tmp_path: Path):
    runs = [run(tmp_path / str(seed), seed=seed, updates=1) for seed in (3, 4)]
    agreed, differing = compare(runs)
    assert agreed == 0
    assert {"losses", "parameters", "rng"} <= set(differing)


def test_the_first_difference_is_found():
    same = {"losses": "a", "parameters": "b"}
    assert compare([[same] * 3, [same, {**same, "losses": "c"}, same]]) == (1, ["losses"])


@pytest.mark.drill
def test_200_updates_in_processes_of_their_own_are_identical():
    parser = argparse.ArgumentParser()
    determinism.add_arguments(parser)
    (row,) = determinism.rows(parser.parse_args([]))
    assert row.value == 200


def test_runs_that_differ_are_an_error_after_the_row(monkeypatch: pytest.MonkeyPatch):
    traces = iter([[{"losses": "a"}, {"losses": "b"}], [{"losses": "a"}, {"losses": "c"}]])
    monkeypatch.setattr(determinism, "_run", lambda options: next(traces))
    parser = argparse.ArgumentParser()
    determinism.add_arguments(parser)
    found = determinism.rows(parser.parse_args(["--updates", "2"]))
    assert next(found).value == 1
    with pytest.raises(IntegrityError, match=r"differ in \['losses'\] after update 2"):
        next(found)
