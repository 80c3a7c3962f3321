"""Shard and reader against plain lists, in any order of inserting, evicting, sampling, writing, dying."""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replay import synthetic
from replay.batch_spec import BatchSpec
from replay.limiter import RateLimiter
from replay.priorities import FLOOR
from replay.reader import LocalReader
from replay.selection import Sampling
from replay.shard import ReplayShard
from system.experience import StreamId, WriteBack
from tests.unit.replay.conftest import MEMORY

TABLE = synthetic.vector_table()
CAPACITY, SEGMENT, BLOCK, EPISODE, ENVS = 448, 64, 64, 25, 3
SHARES = (
    {"prioritized": 1.0},
    {"uniform": 1.0, "online": 1.0, "recency": 0.5, "prioritized": 1.0},
    {"uniform": 1.0},
)


@dataclass
class Model:
    """What must be in replay: lists by environment, nothing clever."""

    rows: dict[int, list[tuple[int, int]]] = field(  # (incarnation, number) of every row ever
        default_factory=lambda: {env: [] for env in range(ENVS)}
    )
    lo: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(ENVS), 0))  # first live row
    latent: dict[tuple[int, int], Any] = field(default_factory=dict)  # overlay rows that were written
    priority: dict[tuple[int, int], float] = field(default_factory=dict)  # by (env, block)
    incarnation: int = 0

    def new_rows(self, env: int) -> int:
        """Where the current incarnation goes on."""
        return sum(incarnation == self.incarnation for incarnation, _ in self.rows[env])

    def live(self, env: int) -> range:
        return range(self.lo[env], len(self.rows[env]))

    def begins(self, env: int, position: int) -> bool:
        return self.rows[env][position][1] % EPISODE == 0

    def starts(self, spec: BatchSpec) -> list[tuple[int, int]]:
        """Every legal start, by looking at every row."""
        found: list[tuple[int, int]] = []
        for env in range(ENVS):
            live = self.live(env)
            for start in live[: max(0, len(live) - spec.span + 1)]:
                inside = range(start + 1, start + spec.span)
                if spec.cross_episodes or not any(self.begins(env, p) for p in inside):
                    found.append((env, start))
        return found

    def true_row(self, env: int, position: int) -> dict[str, Any]:
        incarnation, number = self.rows[env][position]
        stream = StreamId(actor=0, env=env)
        chunk = synthetic.rows(TABLE, stream, number, 1, incarnation=incarnation, episode_length=EPISODE)
        row = {name: values[0] for name, values in chunk.columns.items()}
        return row | ({"latent": self.latent[env, position]} if (env, position) in self.latent else {})


class ReplayMachine(RuleBasedStateMachine):
    """The rules; `Model` is the truth."""

    spec: BatchSpec

    @initialize(shares=st.sampled_from(SHARES))
    def open(self, shares: dict[str, float]) -> None:
        base = MEMORY if MEMORY.is_dir() else None
        self.directory = tempfile.TemporaryDirectory(dir=base)
        self.root = Path(self.directory.name) / "replay"
        self.shares = shares
        self.model = Model()
        self.last: Any = None
        self.saved: tuple[str, Model, list[Any]] | None = None
        self.shard = self.open_shard()
        self.reader = self.open_reader()
        for env in range(ENVS):
            self.insert(env, 60, 0)

    def open_shard(self) -> ReplayShard:
        return ReplayShard(self.root, 0, TABLE, capacity_rows=CAPACITY, segment_rows=SEGMENT)

    def open_reader(self) -> LocalReader:
        reader = LocalReader(
            self.root,
            TABLE,
            spec=self.spec,
            sampling=Sampling(shares=self.shares, exponent=0.7, importance=0.5, backlog=8),
            seed=3,
            limiter=RateLimiter(1e6, 0, 10**6, 1),
            controls=[self.shard],
        )
        assert reader.settle(30.0)
        return reader

    def teardown(self) -> None:
        if hasattr(self, "shard"):
            self.reader.close()
            self.shard.close()
            self.directory.cleanup()

    # ---- what may happen --------------------------------------------------------------------------

    @rule(env=st.integers(0, ENVS - 1), count=st.integers(1, 150), again=st.integers(0, 40))
    def insert(self, env: int, count: int, again: int) -> None:
        """New rows behind some that were sent before; the oldest segments leave."""
        model, known = self.model, self.model.new_rows(env)
        begin = max(0, known - again)
        chunk = synthetic.rows(
            TABLE,
            StreamId(actor=0, env=env),
            begin,
            known - begin + count,
            incarnation=model.incarnation,
            episode_length=EPISODE,
        )
        ack = self.shard.append([chunk], 5.0)
        assert (ack.committed, ack.duplicates) == (count, known - begin)
        model.rows[env] += [(model.incarnation, n) for n in range(known, known + count)]
        self.follow()

    @rule()
    def restart_actor(self) -> None:
        self.model.incarnation += 1
        self.insert(0, 1, 0)

    @rule()
    def restart_shard(self) -> None:
        self.shard.close()
        self.shard = self.open_shard()
        state = json.loads(json.dumps(self.reader.state()))
        self.reader.close()
        self.reader = self.open_reader()
        self.reader.load(state)
        self.last = None

    @precondition(lambda self: self.model.starts(self.spec))
    @rule(times=st.integers(2, 4))
    def sample(self, times: int) -> None:
        for _ in range(times):
            self.last = self.reader.sample(5.0)
            self.check(self.last)

    @precondition(lambda self: self.last is not None)
    @rule(data=st.data())
    def write_back(self, data: st.DataObject) -> None:
        spec, ids = self.spec, self.last.ids
        offset = data.draw(st.integers(0, spec.time - 1))
        length = data.draw(st.integers(1, spec.time - offset))
        rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
        latent = rng.integers(0, 1 << 16, (spec.batch, length, 2)).astype(np.uint16)
        priority = rng.random((spec.batch, length)).astype(np.float32)
        back = WriteBack(ids=ids, offset=offset, columns={"latent": latent}, priority=priority)
        before = self.reader.dropped_write_backs
        written = self.reader.write_back(back)
        by_block: dict[tuple[int, int], list[float]] = {}
        alive = 0
        for b, (env, start) in enumerate(zip(ids.stream.tolist(), ids.start.tolist(), strict=True)):
            for i in range(length):
                position = start + (offset + i) * spec.step
                if position >= self.model.lo[env]:
                    alive += 1
                    self.model.latent[env, position] = latent[b, i]
                if position // BLOCK >= self.model.lo[env] // BLOCK and self.model.live(env):
                    by_block.setdefault((env, position // BLOCK), []).append(float(priority[b, i]))
        assert written == alive
        assert self.reader.dropped_write_backs - before == spec.batch * length - alive
        self.model.priority |= {block: float(np.mean(values)) for block, values in by_block.items()}

    @rule()
    def checkpoint(self) -> None:
        """What follows from here is drawn, and must be drawn again after `resume`."""
        state = json.dumps(self.reader.state())
        model = copy.deepcopy(self.model)
        drawn = [self.reader.sample(5.0) for _ in range(2 if self.model.starts(self.spec) else 0)]
        self.saved = (state, model, [self.taken_down(s) for s in drawn])
        self.last = drawn[-1] if drawn else self.last

    @precondition(lambda self: self.saved is not None and self.saved[1].rows == self.model.rows)
    @rule()
    def resume(self) -> None:
        """The learner died: no rows came since its checkpoint, so the same batches follow bit for bit."""
        assert self.saved is not None
        state, then, drawn = self.saved
        self.reader.close()
        self.reader = self.open_reader()
        self.reader.load(json.loads(state))
        self.model.priority = copy.deepcopy(then.priority)
        for wanted in drawn:
            self.last = self.reader.sample(5.0)
            self.check(self.last)
            np.testing.assert_equal(self.taken_down(self.last), wanted)

    # ---- what must hold ---------------------------------------------------------------------------

    @invariant()
    def live_rows_are_the_newest(self) -> None:
        if hasattr(self, "reader"):
            self.follow()

    def follow(self) -> None:
        """Take over how far the shard evicted, if it did so by the rules."""
        model = self.model
        total = sum(map(len, model.rows.values()))
        inserted, live = self.reader.counts()
        assert inserted == total
        assert min(total, CAPACITY - SEGMENT) <= live + (SEGMENT if total > CAPACITY else 0)
        assert live <= CAPACITY
        for env, rows in model.rows.items():
            bounds = self.reader._view.index.stream(0, env).bounds
            assert len(bounds) <= 1
            lo, hi = bounds[0] if bounds else (len(rows), len(rows))
            assert hi == len(rows)
            assert lo >= model.lo[env]
            model.lo[env] = lo
        assert live == sum(len(model.live(env)) for env in model.rows)
        model.priority = {
            (env, block): value
            for (env, block), value in model.priority.items()
            if block >= model.lo[env] // BLOCK and model.live(env)
        }

    def check(self, sequence: Any) -> None:
        spec, model = self.spec, self.model
        legal = model.starts(spec)
        assert sequence.shape == (spec.batch, spec.time)
        places = list(zip(sequence.ids.stream.tolist(), sequence.ids.start.tolist(), strict=True))
        for b, (env, start) in enumerate(places):
            assert (env, start) in legal
            positions = [start + i * spec.step for i in range(spec.time)]
            for i, position in enumerate(positions):
                true = model.true_row(env, position)
                skipped = range(positions[i - 1] + 1, position + 1) if i else ()
                true["is_first"] |= any(model.begins(env, p) for p in skipped)
                following = range(position + 1, position + 1 + (spec.step if i + 1 < spec.time else 0))
                true["is_last"] |= any(model.begins(env, p) for p in following)
                for name, value in true.items():
                    np.testing.assert_array_equal(sequence.columns[name][b, i], value, err_msg=name)
            if spec.goal:
                self.check_goal(sequence.goal, b, env, positions[-1])
        if self.shares.keys() == {"prioritized"}:
            self.check_weights(sequence.weights, places, legal)

    def check_goal(self, goal: Any, b: int, env: int, last: int) -> None:
        model = self.model
        ahead = int(goal["step"][b]) - model.rows[env][last][1] % EPISODE
        assert ahead >= 0
        assert not any(model.begins(env, p) for p in range(last + 1, last + ahead + 1))
        for name, value in model.true_row(env, last + ahead).items():
            np.testing.assert_array_equal(goal[name][b], value, err_msg=name)

    def check_weights(
        self, weights: Any, places: list[tuple[int, int]], legal: list[tuple[int, int]]
    ) -> None:
        known = self.model.priority
        top = (max(known.values()) + FLOOR) ** 0.7 if known else 1.0

        def scaled(env: int, start: int) -> float:
            block = (env, start // BLOCK)
            return (known[block] + FLOOR) ** 0.7 if block in known else top

        total = sum(scaled(*place) for place in legal)
        raw = np.asarray([(len(legal) * scaled(*place) / total) ** -0.5 for place in places])
        np.testing.assert_allclose(weights, raw / raw.max(), rtol=1e-3)

    def taken_down(self, sequence: Any) -> dict[str, Any]:
        """All of a batch but its latents, which may be newer when it is drawn again."""
        values = {**sequence.columns, **{f"goal {k}": v for k, v in (sequence.goal or {}).items()}}
        values |= {"stream": sequence.ids.stream, "start": sequence.ids.start, "weights": sequence.weights}
        return {k: copy.copy(v) for k, v in values.items() if not k.endswith("latent")}


def case_of(spec: BatchSpec) -> Any:
    """The machine over batches of one kind, as pytest collects it."""
    case = type("Machine", (ReplayMachine,), {"spec": spec}).TestCase
    case.settings = settings(
        max_examples=10,
        stateful_step_count=16,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return case


test_whole_sequences = case_of(BatchSpec(batch=6, length=7, context=2))
test_sequences_within_episodes = case_of(BatchSpec(batch=6, length=7, cross_episodes=False, goal=True))
test_strided_sequences = case_of(BatchSpec(batch=6, length=4, context=1, stride=3))
test_pairs = case_of(BatchSpec(batch=6, length=2, pair=9))
