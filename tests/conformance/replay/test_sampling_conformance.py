"""What every reader must do with selectors, sources, episodes, goals and priorities."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from scipy import stats

from replay import synthetic
from replay.batch_spec import BatchSpec
from replay.selection import Sampling
from system.errors import ConfigError, DeadlineError, SchemaError
from system.experience import WriteBack
from tests.conformance.replay.replays import EPISODE, Open, assert_true_rows, rows

SHARES = {
    "uniform": {"uniform": 1.0},
    "online": {"online": 1.0},
    "recency": {"recency": 1.0},
    "prioritized": {"prioritized": 1.0},
    "mixture": {"uniform": 1.0, "online": 0.5, "recency": 0.5, "prioritized": 1.0},
}


def fill(p: Any, count: int = 400) -> None:
    for start in range(0, count, 100):
        p.writer.append([rows(start, 100), rows(start, 100, env=1), rows(start, 100, env=5)], 10.0)


def back(sequence: Any, offset: int = 0, length: int = 8, value: float = 1.0) -> WriteBack:
    priority = np.full((len(sequence.ids.start), length), value, np.float32)
    return WriteBack(ids=sequence.ids, offset=offset, columns={}, priority=priority)


@pytest.mark.parametrize("name", SHARES)
def test_every_selector_draws_true_rows_and_goes_on_bit_for_bit_after_a_load(pair: Open, name: str) -> None:
    with pair(sampling=Sampling(shares=SHARES[name], half_life=20.0)) as p:
        fill(p)
        for n in range(5):
            sequence = p.reader.sample(10.0)
            assert_true_rows(sequence)
            p.reader.write_back(back(sequence, value=float(n)))
        p.writer.append([rows(400, 50)], 10.0)
        state = json.loads(json.dumps(p.reader.state()))
        wanted = [p.reader.sample(10.0) for _ in range(3)]
        wanted = [({k: v.copy() for k, v in w.columns.items()}, asdict(w.ids), w.weights) for w in wanted]
        for _ in range(3):
            p.reader.write_back(back(p.reader.sample(10.0), value=9.0))
        p.reader.load(state)
        for columns, ids, weights in wanted:
            again = p.reader.sample(10.0)
            np.testing.assert_equal(asdict(again.ids), ids)
            np.testing.assert_equal(dict(again.columns), columns)
            np.testing.assert_equal(again.weights, weights)
            assert (weights is None) == ("prioritized" not in SHARES[name])


def test_batches_do_not_share_memory_nor_change_those_before(pair: Open) -> None:
    spec = BatchSpec(batch=4, length=8, cross_episodes=False, goal=True)
    sampling = Sampling(shares={"uniform": 1.0, "prioritized": 1.0})
    with pair(spec=spec, sampling=sampling, ring=2) as p:
        fill(p)
        first, second = p.reader.sample(10.0), p.reader.sample(10.0)
        arrays = [
            [*s.columns.values(), *s.goal.values(), s.weights, s.ids.shard, s.ids.stream, s.ids.start]
            for s in (first, second)
        ]
        for n, a in enumerate(arrays[0]):
            assert not any(np.shares_memory(a, b) for b in arrays[1])
            assert not any(np.shares_memory(a, b) for b in arrays[0][n + 1 :])


def test_within_one_episode_no_border_is_inside_a_sequence(pair: Open) -> None:
    with pair(spec=BatchSpec(batch=16, length=20, context=1, cross_episodes=False)) as p:
        fill(p)
        seen: set[int] = set()
        for _ in range(60):
            sequence = p.reader.sample(10.0)
            assert_true_rows(sequence)
            assert not sequence.columns["is_first"][:, 1:].any()
            assert not sequence.columns["is_last"][:, :-1].any()
            seen |= set((sequence.ids.start % EPISODE).tolist())
        assert seen == set(range(EPISODE - 20))


def test_sampling_within_episodes_waits_until_one_is_long_enough(pair: Open) -> None:
    with pair(spec=BatchSpec(batch=2, length=EPISODE + 1, cross_episodes=False)) as p:
        fill(p)
        with pytest.raises(DeadlineError, match="an episode with 51 consecutive live rows"):
            p.reader.sample(0.05)


def test_a_goal_is_a_later_row_of_the_same_episode(pair: Open) -> None:
    with pair(spec=BatchSpec(batch=8, length=6, cross_episodes=False, goal=True)) as p:
        fill(p)
        ahead: list[int] = []
        for _ in range(50):
            sequence = p.reader.sample(10.0)
            goal = sequence.goal
            assert goal is not None
            assert goal.keys() == sequence.columns.keys()
            for b in range(8):
                last = int(synthetic.row_number(sequence.columns, EPISODE)[b, -1])
                number = int(synthetic.row_number(goal, EPISODE)[b])
                assert number >= last
                assert number // EPISODE == last // EPISODE
                true = rows(number, 1, env=int(sequence.ids.stream[b]))
                np.testing.assert_array_equal(goal["vector"][b], true.columns["vector"][0])
                ahead.append(number - last)
        assert min(ahead) == 0
        assert max(ahead) > 20


@pytest.mark.parametrize(
    ("spec", "gaps"),
    [(BatchSpec(batch=8, length=5, context=1, stride=7), 7), (BatchSpec(batch=8, length=2, pair=40), 40)],
)
def test_rows_of_a_sequence_are_a_stride_apart_and_borders_between_them_are_told(
    pair: Open, spec: BatchSpec, gaps: int
) -> None:
    with pair(spec=spec) as p:
        fill(p)
        borders = 0
        for _ in range(20):
            sequence = p.reader.sample(10.0)
            assert sequence.shape == (8, spec.time)
            numbers = synthetic.row_number(sequence.columns, EPISODE)
            assert (np.diff(numbers, axis=1) == gaps).all()
            crossed = np.diff(numbers // EPISODE, axis=1) > 0
            np.testing.assert_array_equal(sequence.columns["is_first"][:, 1:], crossed)
            assert (sequence.columns["is_last"][:, :-1] >= crossed).all()
            borders += int(crossed.sum())
        assert borders > 0


def test_rows_written_back_to_a_strided_sequence_are_found_where_they_were(pair: Open) -> None:
    with pair(spec=BatchSpec(batch=2, length=4, stride=5)) as p:
        p.writer.append([rows(0, 60)], 10.0)
        sequence = p.reader.sample(10.0)
        latent = np.arange(16, dtype=np.uint16).reshape(2, 4, 2) + 1
        assert p.reader.write_back(WriteBack(ids=sequence.ids, offset=0, columns={"latent": latent})) == 8
        wanted = {int(s) + 5 * i: latent[b, i] for b, s in enumerate(sequence.ids.start) for i in range(4)}
        found = 0
        for _ in range(60):
            later = p.reader.sample(10.0)
            for b, start in enumerate(later.ids.start.tolist()):
                for i in range(4):
                    true = rows(start + 5 * i, 1).columns["latent"][0]
                    value = wanted.get(start + 5 * i, true)
                    np.testing.assert_array_equal(later.columns["latent"][b, i], value)
                    found += start + 5 * i in wanted
        assert found > 0


def test_new_rows_are_trained_on_once_each_in_order(pair: Open) -> None:
    with pair(sampling=Sampling(shares={"online": 1.0})) as p:
        trained: list[int] = []
        for start in range(0, 640, 64):
            p.writer.append([rows(start, 64)], 10.0)
            for _ in range(2):
                sequence = p.reader.sample(10.0)
                assert_true_rows(sequence)
                trained += synthetic.row_number(sequence.columns, EPISODE)[:, 1:].reshape(-1).tolist()
        assert sorted(set(trained)) == list(range(1, max(trained) + 1))
        assert trained[:56] == list(range(1, 57))
        assert p.reader.limiter.trained == 20 * 32


def test_priorities_decide_what_is_drawn_and_weights_undo_it(pair: Open) -> None:
    sampling = Sampling(shares={"prioritized": 1.0}, exponent=1.0, importance=1.0)
    with pair(batch=64, context=0, sampling=sampling) as p:
        p.writer.append([rows(0, 256 + 7)], 10.0)  # 256 starts in four blocks
        sequence = p.reader.sample(10.0)
        assert sequence.weights is not None
        assert (sequence.weights == 1).all()  # nothing is known: all alike
        for block, value in enumerate((1.0, 2.0, 3.0, 4.0)):
            where = np.full(64, 64 * block, np.int64)
            ids = type(sequence.ids)(shard=sequence.ids.shard, stream=sequence.ids.stream, start=where)
            priority = np.full((64, 3), value, np.float32)
            p.reader.write_back(WriteBack(ids=ids, offset=2, columns={}, priority=priority))
        seen = np.zeros(4)
        for _ in range(60):
            sequence = p.reader.sample(10.0)
            block = sequence.ids.start // 64
            seen += np.bincount(block, minlength=4)
            wanted = 1.0 / (block + 1)
            np.testing.assert_allclose(sequence.weights, wanted / wanted.max(), rtol=1e-4)
        assert stats.chisquare(seen, np.asarray([0.1, 0.2, 0.3, 0.4]) * seen.sum()).pvalue > 0.001


def test_priorities_of_evicted_rows_are_dropped_and_counted(pair: Open) -> None:
    with pair(capacity_rows=512, sampling=Sampling(shares={"prioritized": 1.0})) as p:
        p.writer.append([rows(0, 300)], 10.0)
        sequence = p.reader.sample(10.0)
        for start in range(300, 1500, 100):
            p.writer.append([rows(start, 100)], 10.0)
        p.reader.write_back(back(sequence))
        assert p.reader.dropped_priorities == 32
        assert_true_rows(p.reader.sample(10.0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_priority_that_cannot_be_is_refused(pair: Open, value: float) -> None:
    with pair(sampling=Sampling(shares={"prioritized": 1.0})) as p:
        fill(p, 100)
        with pytest.raises(SchemaError, match="priority"):
            p.reader.write_back(back(p.reader.sample(10.0), value=value))


def test_rows_cut_by_a_restarted_actor_are_another_episode(pair: Open) -> None:
    with pair(spec=BatchSpec(batch=8, length=12, cross_episodes=False)) as p:
        p.writer.append([rows(0, 20), rows(0, 20, incarnation=1)], 10.0)
        for _ in range(10):
            sequence = p.reader.sample(10.0)
            assert set(sequence.ids.start.tolist()) <= {*range(9), *range(20, 29)}


def test_a_batch_that_cannot_be_is_refused(pair: Open) -> None:
    with pytest.raises(ConfigError, match="ring"), pair(ring=0):
        pass
    with pytest.raises(ConfigError, match="weight"), pair(own_weight=0.0):
        pass
    with (
        pytest.raises(ConfigError, match="capacity_rows"),
        pair(spec=BatchSpec(batch=4, length=9, stride=60), capacity_rows=512),
    ):
        pass


def test_a_state_of_other_batches_keeps_what_fits(pair: Open) -> None:
    with pair() as p:
        fill(p)
        p.reader.sample(10.0)
        state = json.loads(json.dumps(p.reader.state()))
    with pair(length=9, sampling=Sampling(shares={"uniform": 1.0, "prioritized": 1.0})) as p:
        p.writer.append([rows(0, 1)], 10.0)
        p.reader.load(state)
        assert p.reader.limiter.trained == state["limiter"]["trained"] > 0
        fill(p)  # the first row is there already
        sequence = p.reader.sample(10.0)
        assert sequence.shape[1] == 10
        assert p.reader.limiter.trained == state["limiter"]["trained"] + sequence.shape[0] * 9
