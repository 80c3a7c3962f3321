"""The actor: runs the environment loop, ships its rows to the replay, keeps its policy fresh.

Between `actors.loop` (where rows come from), `replay`'s writer (where they go) and the parameter server
(where weights come from). A plain class: Ray or a local process calls run() in slices.
Letters: N environments, n rows of one recv, T rows of one chunk.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from actors.loop import LoopStep, env_loop
from actors.policy_feed import PolicyFeed, WarmingPolicy
from actors.random_policy import RandomPolicy
from actors.staging import Staging
from system.errors import ConfigError, DeadlineError
from system.experience import Chunk, EpisodeStats
from system.interfaces import Policy, ReplayWriter, VectorEnv, WeightSource
from system.metrics import Metrics
from system.seeds import child_seed
from system.specs import TableSpec
from system.weights import PolicyVersion

log = logging.getLogger(__name__)

MIN_WAIT = 0.1  # seconds an append gets even at the end of a slice


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorReport:
    """What one run() did. Made by Actor.run, taken by the driver; counts are of this slice."""

    index: int
    incarnation: int
    rows: int  # rows made
    acknowledged: int  # rows the replay confirmed, repeats included
    pending: int  # rows made and not acknowledged at the end of the slice
    episodes: tuple[EpisodeStats, ...]
    policy_version: PolicyVersion
    lag: int  # versions the policy was behind when the newest weights arrived
    weights_age: float  # seconds since the weight source last answered
    waits: Mapping[str, float]  # seconds by cause: env, policy, append, weights
    restarts: Mapping[str, int]  # environments rebuilt, by reason
    wall: float  # seconds


class Actor:
    """Collects experience with `env` and `policy`.

    Rows are kept until acknowledged; while an append waits (limiter, dead shard) no new rows are made,
    so at most `chunk_rows` + 1 rows per environment are ever unacknowledged. Until the first weights come
    the actor plays at random (version 0), or waits when `wait_for_policy`.
    """

    def __init__(
        self,
        index: int,
        incarnation: int,
        env: VectorEnv,
        policy: Policy,
        writer: ReplayWriter,
        source: WeightSource,
        *,
        table: TableSpec,
        seed: int,
        chunk_rows: int = 16,
        chunk_seconds: float = 1.0,
        append_timeout: float = 10.0,
        pull_seconds: float = 1.0,
        pull_timeout: float = 10.0,
        env_timeout: float = 60.0,
        wait_for_policy: bool = False,
        max_weights_age: float | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Times are seconds. `max_weights_age` stops acting while the source is silent for longer.

        Raises: ConfigError for a chunk or time that cannot be; SchemaError when table, environment
        and policy disagree.
        """
        if chunk_rows < 1 or chunk_seconds <= 0 or append_timeout <= 0:
            raise ConfigError(
                f"chunk_rows ({chunk_rows}) must be >= 1, chunk_seconds ({chunk_seconds}) and "
                f"append_timeout ({append_timeout}) > 0; correct the actor's settings"
            )
        self._index = index
        self._incarnation = incarnation
        self._env = env
        self._writer = writer
        self._chunk_seconds = chunk_seconds
        self._append_timeout = append_timeout
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        own_seed = child_seed(seed, "actor", index, "incarnation", incarnation)
        warmup = RandomPolicy(env.spec.action, own_seed, table.overlay)
        self._policy = WarmingPolicy(warmup, policy)
        self._feed = PolicyFeed(
            self._policy, source,
            pull_seconds=pull_seconds, pull_timeout=pull_timeout, wait_for_policy=wait_for_policy,
            max_weights_age=max_weights_age, metrics=metrics, clock=clock,
        )  # fmt: skip
        self._staging = Staging(index, incarnation, env.num_envs, table, policy.columns, chunk_rows)
        self._unacknowledged: list[Chunk] = []
        self._unacknowledged_rows = 0
        self._lost_rows = 0
        self._flushed = clock()
        self._restarts_seen: Counter[str] = Counter()
        env.start(own_seed)
        self._loop = env_loop(env, self._policy, "train", timeout=env_timeout)
        if metrics is not None:
            metrics["actor_incarnation"].set(incarnation)

    def run(self, seconds: float) -> ActorReport:
        """Collect for about `seconds`; a pull or a wait for rows may end up to its timeout later.

        Raises: EnvError, DivergedError, RejectedError, SchemaError: the actor is then spent, and a
        successor must take a new incarnation.
        """
        begin = self._clock()
        until = begin + seconds
        slice_ = _Slice()
        while self._clock() < until:
            self._refresh(until, slice_)
            if self._feed.must_wait:
                continue
            if self._unacknowledged:
                self._append(min(self._append_timeout, max(until - self._clock(), MIN_WAIT)), slice_)
                continue
            self._take(next(self._loop), slice_)
            if self._staging.full or self._clock() - self._flushed >= self._chunk_seconds:
                self._flush()
        return self._report(slice_, self._clock() - begin)

    def close(self) -> int:
        """Send what is staged, give up after `append_timeout`; returns all rows lost in this life."""
        slice_ = _Slice()
        lost = 0
        try:
            if self._unacknowledged:
                self._append(self._append_timeout, slice_)
            if not self._unacknowledged and self._staging.rows:
                self._flush(everything=True)
                self._append(self._append_timeout, slice_)
        finally:
            lost = self._unacknowledged_rows + self._staging.rows
            if lost:
                log.warning("rows lost at close", extra={"actor": self._index, "rows": lost})
                if self._metrics is not None:
                    self._metrics.labels("actor_rows_lost_total", reason="close").inc(lost)
            self._loop.close()
            self._env.close()
            self._writer.close()
        return lost + self._lost_rows

    def _refresh(self, until: float, slice_: _Slice) -> None:
        """Pull weights when it is time to; wait for that time when nothing may be done before."""
        begin = self._clock()
        if begin >= self._feed.next_pull:
            self._feed.pull()
        elif not self._feed.must_wait:
            return
        else:
            self._sleep(max(min(self._feed.next_pull, until) - begin, 0.0))
        slice_.waits["weights"] += self._clock() - begin

    def _take(self, rows: LoopStep, slice_: _Slice) -> None:
        self._staging.add(rows)
        slice_.rows += len(rows.step)
        slice_.episodes.extend(rows.episodes)
        slice_.waits["env"] += rows.env_seconds
        slice_.waits["policy"] += rows.policy_seconds

    def _flush(self, *, everything: bool = False) -> None:
        self._unacknowledged = self._staging.flush(everything=everything)
        self._unacknowledged_rows = sum(len(chunk) for chunk in self._unacknowledged)
        self._flushed = self._clock()

    def _append(self, timeout: float, slice_: _Slice) -> None:
        """Send the unacknowledged chunks once; they stay when the deadline passes."""
        begin = self._clock()
        try:
            ack = self._writer.append(self._unacknowledged, timeout)
        except DeadlineError:
            pass  # back-pressure: the same rows go again, the store drops what it has
        else:
            confirmed = ack.committed + ack.duplicates  # fewer when rows were lost with their shard
            slice_.acknowledged += confirmed
            self._lost_rows += self._unacknowledged_rows - confirmed
            self._unacknowledged = []
            self._unacknowledged_rows = 0
        slice_.waits["append"] += self._clock() - begin

    def _report(self, slice_: _Slice, wall: float) -> ActorReport:
        counts = Counter(getattr(self._env, "restarts", {}))
        restarts = counts - self._restarts_seen
        self._restarts_seen = counts
        if self._metrics is not None:
            self._export(self._metrics, slice_, restarts)
        return ActorReport(
            index=self._index,
            incarnation=self._incarnation,
            rows=slice_.rows,
            acknowledged=slice_.acknowledged,
            pending=self._unacknowledged_rows + self._staging.rows,
            episodes=tuple(slice_.episodes),
            policy_version=self._policy.version,
            lag=self._feed.lag,
            weights_age=self._feed.age,
            waits=dict(slice_.waits),
            restarts=dict(restarts),
            wall=wall,
        )

    def _export(self, metrics: Metrics, slice_: _Slice, restarts: Counter[str]) -> None:
        metrics["actor_env_steps_total"].inc(slice_.rows)
        metrics["actor_rows_acknowledged_total"].inc(slice_.acknowledged)
        metrics["actor_episodes_total"].inc(len(slice_.episodes))
        if slice_.episodes:
            metrics["actor_episode_return"].set(slice_.episodes[-1].score)
            metrics["actor_episode_length"].set(slice_.episodes[-1].length)
        for cause in ("env", "policy", "append"):
            metrics[f"actor_{cause}_seconds_total"].inc(slice_.waits[cause])
        for reason, count in restarts.items():
            metrics.labels("actor_env_restarts_total", reason=reason).inc(count)


class _Slice:
    """Counters of one run()."""

    def __init__(self) -> None:
        self.rows = 0
        self.acknowledged = 0
        self.episodes: list[EpisodeStats] = []
        self.waits: dict[str, float] = {"env": 0.0, "policy": 0.0, "append": 0.0, "weights": 0.0}
