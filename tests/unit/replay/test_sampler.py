"""The sampler over homes that may be gone or far away, and over several sources."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from replay import synthetic
from replay.batch_spec import BatchSpec
from replay.index import StartIndex
from replay.limiter import RateLimiter
from replay.memory import MemoryReplay
from replay.plans import Planner
from replay.reader import LocalReader
from replay.rows import MemoryHome, RowsGone, RowViews
from replay.sampler import Sampler
from replay.selection import Sampling
from replay.shard import ReplayShard
from system.errors import ConfigError, DeadlineError, SchemaError
from system.experience import SequenceIds, StreamId, WriteBack
from system.specs import TableSpec

TABLE = synthetic.vector_table()
SPEC = BatchSpec(batch=4, length=8, context=1)


class FarHome(MemoryHome):
    """Rows of one stream that may be gone; remembers what it was told."""

    def __init__(self, shard: int, stream: int, start: int, count: int) -> None:
        chunk = synthetic.rows(TABLE, StreamId(actor=shard, env=stream), start, count)
        super().__init__({name: np.asarray(chunk.columns[name]) for name in TABLE.all}, TABLE.overlay)
        self.gone = False
        self.told: list[tuple[int, int]] = []
        self.copied: list[tuple[int, int]] = []

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        if self.gone:
            raise RowsGone
        self.copied.append((first, count))
        super().copy_rows(target, at, first, count)

    def will_need(self, first: int, count: int) -> None:
        self.told.append((first, count))


def make(
    homes: Sequence[FarHome], spec: BatchSpec = SPEC, seed: int = 0, **sampling: Any
) -> tuple[Sampler, StartIndex[Any], Planner]:
    """A sampler over one stream of 200 rows in each home."""
    index: StartIndex[Any] = StartIndex(spec.span)
    for n, home in enumerate(homes):
        index.add(0, n, 0, home, 0, 200)
    planner = Planner(TABLE.all, spec, [(index, 1.0)], sampling=Sampling(**sampling), seed=seed)
    return Sampler(TABLE.all, spec, planner, ring=2), index, planner


def streams_of(homes: int) -> list[FarHome]:
    return [FarHome(0, n, 0, 200) for n in range(homes)]


def places(sequence: Any) -> list[tuple[int, int]]:
    return list(zip(sequence.ids.stream.tolist(), sequence.ids.start.tolist(), strict=True))


def test_rows_that_are_gone_are_replaced_by_others() -> None:
    homes = streams_of(3)
    sampler, _, _ = make(homes)
    homes[1].gone = True
    for _ in range(30):
        sequence = sampler.draw()
        assert set(sequence.ids.stream.tolist()) <= {0, 2}
        for b, (stream, start) in enumerate(places(sequence)):
            true = synthetic.rows(TABLE, StreamId(actor=0, env=stream), start, 9)
            np.testing.assert_array_equal(sequence.columns["vector"][b], true.columns["vector"])
    assert sampler.redraws > 10


def test_when_everything_is_gone_the_sampler_gives_up_after_a_bounded_number_of_draws() -> None:
    homes = streams_of(2)
    sampler, index, _ = make(homes)
    for home in homes:
        home.gone = True
    with pytest.raises(DeadlineError, match="gone when they were to be copied"):
        sampler.draw()
    assert 32 * 4 < sampler.redraws <= 33 * 4
    for home in homes:
        index.drop(home)
    with pytest.raises(DeadlineError, match="no source has a sequence"):
        sampler.draw()


def test_batches_planned_ahead_are_announced_and_then_drawn_as_announced() -> None:
    homes = streams_of(2)
    sampler, _, _ = make(homes)
    for n in range(6):
        sampler.draw(ahead=3)
        copied, told = ([len(getattr(h, what)) for h in homes] for what in ("copied", "told"))
        assert sum(copied) == 4 * (n + 1)
        assert sum(told) == 4 * (n + 4)
    for home in homes:
        assert home.told[: len(home.copied)] == home.copied


def test_planning_ahead_does_not_change_what_is_drawn() -> None:
    near, far = make(streams_of(3))[0], make(streams_of(3))[0]
    for ahead in (4, 4, 2, 0, 0, 0, 4, 4):
        assert places(near.draw()) == places(far.draw(ahead))


def test_plans_survive_a_checkpoint_and_are_announced_again() -> None:
    sampler, _, _ = make(streams_of(3))
    sampler.draw(ahead=4)
    state = json.loads(json.dumps(sampler.state()))
    wanted = [places(sampler.draw(ahead=4)) for _ in range(8)]
    homes = streams_of(3)
    again, _, _ = make(homes, seed=99)
    again.load(state)
    assert sum(len(home.told) for home in homes) == 16
    assert [places(again.draw(ahead=4)) for _ in range(8)] == wanted


def test_plans_of_other_batches_are_left_out() -> None:
    sampler, _, _ = make(streams_of(3))
    sampler.draw(ahead=4)
    other, _, _ = make(streams_of(3), BatchSpec(batch=5, length=8))
    other.load(json.loads(json.dumps(sampler.state())))
    assert other.draw().shape == (5, 8)


def test_plans_without_weights_are_left_out_once_weights_are_asked_for() -> None:
    shares = {"prioritized": 1.0}
    plain, _, _ = make(streams_of(2), shares=shares, importance=0.0)
    plain.draw(ahead=2)
    weighted, _, _ = make(streams_of(2), shares=shares, importance=0.4)
    weighted.load(json.loads(json.dumps(plain.state())))
    assert weighted.draw(ahead=2).weights is not None


def test_planned_rows_that_were_evicted_are_replaced() -> None:
    homes = streams_of(2)
    sampler, index, _ = make(homes)
    sampler.draw(ahead=4)
    index.drop(homes[0])
    for _ in range(4):
        assert set(sampler.draw().ids.stream.tolist()) == {1}
    assert sampler.redraws > 0


def test_a_goal_that_is_gone_costs_its_sequence() -> None:
    spec = BatchSpec(batch=4, length=8, cross_episodes=False, goal=True)
    index: StartIndex[Any] = StartIndex(spec.span)
    early, late = FarHome(0, 0, 0, 30), FarHome(0, 0, 30, 20)  # one episode in two homes
    index.add(0, 0, 0, early, 0, 30)
    index.add(0, 0, 30, late, 0, 20)
    planner = Planner(TABLE.all, spec, [(index, 1.0)], sampling=Sampling(), seed=0)
    sampler = Sampler(TABLE.all, spec, planner, ring=2)
    late.gone = True
    for _ in range(10):
        sequence = sampler.draw()
        assert sequence.goal is not None
        assert (sequence.goal["step"] < 30).all()
        assert (sequence.columns["step"] < 30).all()


# ---- sources ----------------------------------------------------------------------------------------


def limiter() -> RateLimiter:
    return RateLimiter(1000.0, 0, 1_000_000, 1)


def memory(actor: int, **changes: Any) -> MemoryReplay:
    base: dict[str, Any] = {"capacity_rows": 4096, "batch": 10, "length": 8, "context": 0, "seed": 1}
    replay = MemoryReplay(TABLE, **base | {"limiter": limiter()} | changes)
    for env in range(2):
        replay.append([synthetic.rows(TABLE, StreamId(actor=actor, env=env), 0, 300)], 5.0)
    return replay


def test_sources_are_mixed_by_weight_and_named_in_the_batch() -> None:
    demo, old = memory(7), memory(8)
    replay = memory(1, sources={"demo": (demo, 1.0), "old": (old, 0.5)}, own_weight=1.0)
    seen = np.zeros(3)
    for _ in range(400):
        sequence = replay.sample(5.0)
        counts = np.bincount(sequence.source, minlength=3)
        assert (np.abs(counts - np.asarray([4, 4, 2])) <= 1).all()
        seen += counts
        actors = sequence.ids.stream >> 16
        np.testing.assert_array_equal(actors, np.asarray([1, 7, 8])[sequence.source])
    assert stats.chisquare(seen, np.asarray([0.4, 0.4, 0.2]) * seen.sum()).pvalue > 0.001


def test_shares_of_weights_that_do_not_divide_the_batch_are_met_on_average() -> None:
    replay = memory(
        1, sources={"demo": (memory(7), 0.37)}, sampling=Sampling(shares={"uniform": 1, "recency": 2})
    )
    draws = 2000
    demo = sum(int((replay.sample(5.0).source == 1).sum()) for _ in range(draws))
    assert demo / draws == pytest.approx(10 * 0.37 / 1.37, abs=0.05)


def test_a_source_without_weight_is_not_drawn_and_one_without_rows_left_to_the_others() -> None:
    empty = MemoryReplay(TABLE, capacity_rows=512, batch=4, length=8, context=0, seed=0, limiter=limiter())
    replay = memory(1, sources={"demo": (memory(7), 1.0), "empty": (empty, 5.0)}, own_weight=0.0)
    for _ in range(20):
        assert set(replay.sample(5.0).source.tolist()) == {1}


def test_rows_are_written_back_to_their_source() -> None:
    demo = memory(7)
    sampling = Sampling(shares={"prioritized": 1.0})
    replay = memory(1, sources={"demo": (demo, 1.0)}, sampling=sampling)
    sequence = replay.sample(5.0)
    latent = np.full((10, 8, 2), 4242, np.uint16)
    priority = np.ones((10, 8), np.float32)
    back = WriteBack(ids=sequence.ids, offset=0, columns={"latent": latent}, priority=priority)
    assert replay.write_back(back) == 80
    rows = {(s, at + t) for s, at in places(sequence) for t in range(8)}
    seen = {"mixed": 0, "demo": 0}
    for _ in range(60):
        for where, later in (("mixed", replay.sample(5.0)), ("demo", demo.sample(5.0))):
            for b, (stream, start) in enumerate(places(later)):
                for t in range(8):
                    changed = bool((later.columns["latent"][b, t] == 4242).all())
                    assert changed == ((stream, start + t) in rows)
                    seen[where] += changed
    assert min(seen.values()) > 0
    ids = SequenceIds(shard=sequence.ids.shard, stream=sequence.ids.stream, start=sequence.ids.start)
    none = WriteBack(ids=ids, offset=0, columns={}, priority=priority)
    with pytest.raises(SchemaError, match="several sources"):
        replay.write_back(none)


def test_a_local_reader_mixes_another_table_and_resumes_exactly(tmp_path: Any) -> None:
    roots = [tmp_path / name for name in ("run", "demo")]
    shards = [ReplayShard(root, 0, TABLE, capacity_rows=4096) for root in roots]
    for actor, shard in enumerate(shards):
        shard.append([synthetic.rows(TABLE, StreamId(actor=actor, env=0), 0, 300)], 5.0)

    def open_reader() -> LocalReader:
        return LocalReader(
            roots[0],
            TABLE,
            spec=SPEC,
            seed=0,
            limiter=limiter(),
            controls=[shards[0]],
            sources={"demo": (roots[1], 1.0)},
            sampling=Sampling(shares={"prioritized": 1, "online": 1}),
        )

    reader = open_reader()
    for _ in range(5):
        sequence = reader.sample(5.0)
        np.testing.assert_array_equal(sequence.ids.stream >> 16, sequence.source)
        priority = np.full((4, 8), 3.0, np.float32)
        reader.write_back(WriteBack(ids=sequence.ids, offset=1, columns={}, priority=priority))
    shards[0].append([synthetic.rows(TABLE, StreamId(actor=0, env=0), 300, 100)], 5.0)
    state = json.loads(json.dumps(reader.state()))
    wanted = [reader.sample(5.0) for _ in range(4)]
    expected = [(places(s), s.source.tolist(), s.weights.tolist()) for s in wanted]  # type: ignore[union-attr]
    reader.close()
    reader = open_reader()
    reader.load(state)
    for place, source, weights in expected:
        again = reader.sample(5.0)
        assert (places(again), again.source.tolist(), again.weights.tolist()) == (place, source, weights)
    reader.close()
    for shard in shards:
        shard.close()


def test_a_source_without_overlays_keeps_its_columns_apart(tmp_path: Any) -> None:
    table = TableSpec(columns=TABLE.columns, overlay={})  # stored with its keys in another order
    for name in ("own", "other"):
        shard = ReplayShard(tmp_path / name, 0, table, capacity_rows=1024)
        shard.append([synthetic.rows(table, StreamId(actor=0, env=0), 0, 200)], 5.0)
        shard.close()
    reader = LocalReader(
        tmp_path / "own",
        table,
        spec=SPEC,
        seed=0,
        limiter=limiter(),
        controls=[],
        sources={"other": (tmp_path / "other", 1.0)},
    )
    sequence = reader.sample(5.0)
    assert set(sequence.ids.source.tolist()) == {0, 1}
    for b, (_, start) in enumerate(places(sequence)):
        wanted = synthetic.rows(table, StreamId(actor=0, env=0), start, SPEC.time).columns
        for name in table.columns:
            np.testing.assert_array_equal(sequence.columns[name][b], wanted[name], err_msg=name)
    reader.close()


def test_a_source_that_is_no_table_is_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="replay source demo"):
        LocalReader(
            tmp_path / "run",
            TABLE,
            spec=SPEC,
            seed=0,
            limiter=limiter(),
            controls=[],
            sources={"demo": (tmp_path / "demo", 1.0)},
        )
