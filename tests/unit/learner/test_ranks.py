"""Several learner ranks are one learner: the same update, the same statistics; a lost rank is named.

Ranks are processes of their own (gloo). Sums are added in another order than by one rank: values agree to
1e-5, not bit by bit; ranks among each other agree exactly.
"""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.learner.rank_group import RankGroup
from tests.unit.learner.rank_process import BATCH, agent_of, batch_of, snapshot

pytestmark = pytest.mark.slow
UPDATES = 5
TOLERANCE = 1e-5
NOTICED_SECONDS = 10.0
"""What is promised; the ranks here call silence what lasts 3 s."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks had after each update, and rank 1 alone after the last."""
    folder = tmp_path_factory.mktemp("ranks")
    with RankGroup(folder, 2, updates=UPDATES, out=str(folder / "seen")) as group:
        group.until(0, "done")
        group.until(1, "done")
    paths = [folder / f"seen-0-{number}.npz" for number in range(UPDATES)]
    return [dict(np.load(path)) for path in [*paths, folder / "seen-1.npz"]]


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    """The same updates by a single rank."""
    torch.set_num_threads(1)
    agent = agent_of()
    found = []
    for number in range(UPDATES):
        metrics, rows = agent.learn(batch_of(number), agent.initial(BATCH))[1:]
        found.append(snapshot(agent, metrics, rows))
    return found


def named(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if name.startswith(prefix)}
    assert found, prefix
    return found


@pytest.mark.parametrize("number", [0, UPDATES - 1])
def test_two_ranks_make_the_update_that_one_makes(one, two, number):
    start = {f"parameters/{k}": v for k, v in agent_of().state()["parameters"].items()}
    for name, value in named(one[number], "parameters/").items():
        np.testing.assert_allclose(two[number][name], value, rtol=0, atol=TOLERANCE, err_msg=name)
    moved = max(np.abs(one[number][name] - value).max() for name, value in start.items())
    assert moved > 20 * TOLERANCE  # or equality would say nothing


@pytest.mark.parametrize("number", range(UPDATES))
def test_percentiles_of_returns_are_those_of_the_whole_batch(one, two, number):
    np.testing.assert_allclose(two[number]["percentiles"], one[number]["percentiles"], rtol=1e-4, atol=1e-9)
    assert one[UPDATES - 1]["percentiles"][1] > one[UPDATES - 1]["percentiles"][0]


def test_percentiles_and_weights_are_exactly_equal_on_all_ranks(two):
    rank_zero, rank_one = two[UPDATES - 1], two[UPDATES]
    assert np.array_equal(rank_zero["percentiles"], rank_one["percentiles"])
    for name, value in named(rank_one, "parameters/").items():
        assert np.array_equal(rank_zero[name], value), name


@pytest.mark.parametrize("number", [0, UPDATES - 1])
def test_metrics_are_those_of_the_whole_batch(one, two, number):
    assert named(one[number], "metrics/").keys() == named(two[number], "metrics/").keys()
    for name, value in named(one[number], "metrics/").items():
        np.testing.assert_allclose(two[number][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_latents_and_priorities_of_all_ranks_come_back_in_the_order_of_the_batch(one, two):
    for number in range(UPDATES):
        assert np.array_equal(two[number]["ids/stream"], batch_of(number).ids.stream)
        assert np.array_equal(two[number]["ids/start"], batch_of(number).ids.start)
        assert np.array_equal(two[number]["rows/stoch"], one[number]["rows/stoch"])
        np.testing.assert_allclose(
            two[number]["rows/priority"], one[number]["rows/priority"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.drill
def test_late_agents_report_the_whole_batch_also_over_a_resume(tmp_path: Path, one):
    with RankGroup(tmp_path, 2, updates=3, out=str(tmp_path / "seen"), late=True) as group:
        group.until(0, "done")
    first, *later = (dict(np.load(tmp_path / f"seen-0-{number}.npz")) for number in range(3))
    assert "rows/deter" not in first
    for number, found in enumerate(later):
        assert np.array_equal(found["ids/start"], batch_of(number).ids.start)
        assert np.array_equal(found["rows/stoch"], one[number]["rows/stoch"])
        assert found["metrics/loss/total"] == pytest.approx(one[number]["metrics/loss/total"], rel=1e-4)


@pytest.mark.drill
@pytest.mark.parametrize("victim", [1, 0])
def test_killed_rank_is_named_by_the_other(tmp_path: Path, victim: int):
    with RankGroup(tmp_path, 2, updates=10**6) as group:
        group.until(0, "update", 3)
        begun = time.monotonic()
        group.signal(victim, signal.SIGKILL)
        ranks, text, intact = group.until(1 - victim, "lost", seconds=NOTICED_SECONDS)
        assert time.monotonic() - begun < NOTICED_SECONDS
    assert ranks == [victim]
    assert f"learner rank {victim} is lost: its connection closed" in text
    assert "newest checkpoint" in text
    assert intact is (victim == 1)  # rank 0 still has everything a checkpoint needs


def test_stopped_rank_is_named_by_all_others(tmp_path: Path):
    with RankGroup(tmp_path, 3, updates=10**6) as group:
        group.until(0, "update", 3)
        group.signal(2, signal.SIGSTOP)
        found = [group.until(rank, "lost", seconds=NOTICED_SECONDS) for rank in (0, 1)]
    for ranks, text, _ in found:
        assert ranks == [2]
        assert "it has said nothing for" in text


@pytest.mark.drill
def test_rank_that_lives_but_does_not_get_on_is_named(tmp_path: Path):
    with RankGroup(tmp_path, 2, updates=10**6, silence=1.5, tasks={1: {"stuck_after": 8}}) as group:
        group.until(0, "update", 7)
        ranks, text, _ = group.until(0, "lost", seconds=NOTICED_SECONDS)
    assert ranks == [1]
    assert "it is stuck" in text


@pytest.mark.drill
def test_error_of_one_rank_is_told_by_all(tmp_path: Path):
    with RankGroup(tmp_path, 3, updates=10**6, tasks={1: {"fail_after": 4}}) as group:
        assert group.until(1, "failed") == ["no memory for a batch"]
        found = [group.until(rank, "lost", seconds=NOTICED_SECONDS) for rank in (0, 2)]
    for ranks, text, _ in found:
        assert ranks == [1]
        assert "MemoryError: no memory for a batch" in text
