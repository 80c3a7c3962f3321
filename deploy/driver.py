"""The control plane of a run: places roles, watches them, restarts them, counts, and decides the end.

Carries no experience. Backend-neutral: the command line steps it directly, RLlib's `Algorithm`
steps it from training_step. One step reads every role's newest status (1-2 Hz).
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from deploy.fleet import Fleet, RoleStatus
from deploy.rank_group import Mourning, awaited, culprit, end_of, meeting_place, rank_keys
from deploy.roles import RoleSpec
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from system.errors import InfrastructureError
from system.specs import EnvSpec

log = logging.getLogger(__name__)
START_SECONDS = 120.0
FATAL_EXIT_CODES = frozenset({2, 3, 4, 5})
"""Configuration, preflight, divergence and integrity do not heal by restarting."""
RESTART_WINDOW_SECONDS = 600.0
LONGEST_BACKOFF_SECONDS = 5.0
"""Short against the window, or a role that breaks every time would never use up its budget."""
STOP_SECONDS = {"actor": 45.0, "learner": 300.0, "shard": 60.0, "params": 20.0}
"""An actor sends its last rows, a learner ends its update, publishes and saves; then they are killed."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a person or a dashboard wants to know now. Made by the driver once per step."""

    seconds: float = 0.0
    env_steps: int = 0
    env_steps_asked: int = 0
    env_rate: float = 0.0
    episodes: int = 0
    return_mean: float | None = None  # over the newest 20 training episodes
    updates: int = 0
    update_rate: float = 0.0
    train_ratio: float | None = None
    train_ratio_asked: float = 0.0
    policy_version: int = 0
    policy_lag: float = 0.0
    eta_seconds: float | None = None
    actors: int = 0
    restarts: int = 0
    waiting: str = ""  # what the learner waits for right now
    who_waits: str = ""  # for whom, in the last minute
    alarms: tuple[str, ...] = ()  # health alarms of the learner that are on
    learner: Mapping[str, float] = field(default_factory=dict[str, float])


def row_counts(payload: Mapping[str, Any]) -> dict[str, int]:
    """An actor's own count of its rows, which `deploy.audit` sets against the replay; empty for others."""
    names = ("rows", "acknowledged", "lost") if "acknowledged" in payload else ()
    return {name: int(payload[name]) for name in names if name in payload}


class _Rate:
    """Rate over a sliding window of (time, count) pairs."""

    def __init__(self, seconds: float = 30.0) -> None:
        self._points: deque[tuple[float, float]] = deque()
        self._seconds = seconds

    def add(self, now: float, count: float) -> float:
        if self._points and count < self._points[-1][1]:  # a learner went back to its checkpoint
            self._points.clear()
        self._points.append((now, count))
        while now - self._points[0][0] > self._seconds:
            self._points.popleft()
        (t0, c0), (t1, c1) = self._points[0], self._points[-1]
        return (c1 - c0) / (t1 - t0) if t1 > t0 else 0.0


class Driver:
    """Runs one RunConfig on a Fleet."""

    def __init__(self, config: RunConfig, env_spec: EnvSpec, fleet: Fleet, run_dir: RunDirectory) -> None:
        self.config, self.run_dir, self.fleet = config, run_dir, fleet
        self._env_spec = env_spec
        self._specs: dict[str, RoleSpec] = {}
        self._addresses: dict[str, str] = {}  # of services; known while one is being restarted
        self._restarts: dict[str, deque[float]] = defaultdict(deque)
        self._relaunch_at: dict[str, float] = {}
        self._restart_total = 0
        self._restarts_new: Counter[str] = Counter()
        self.metrics_port = 0  # of the process that drives, set by whoever serves its metrics
        self._began = time.monotonic()
        self._env_rate, self._update_rate = _Rate(), _Rate()
        self._returns: deque[float] = deque(maxlen=20)
        self.episodes = 0
        self._episodes_seen: dict[str, int] = {}
        self.curve: list[dict[str, float]] = []
        self.progress = Progress(train_ratio_asked=config.replay.train_ratio)
        self._draining = False
        self._mourning = Mourning(config.learner.rank_timeout)

    def start(self) -> None:
        """Launch services, then the learner and the actors that need their addresses."""
        config = self.config
        self._note_left_behind()
        self._launch("params", 0)
        for index in range(config.shard_count):
            self._launch("shard", index)
        self._await_running(["params-0", *(f"shard-{i}" for i in range(config.shard_count))])
        self._launch_ranks()
        for index in range(config.actors.count):
            self._launch("actor", index)
        self.run_dir.event("run started", backend=config.backend, actors=config.actors.count)

    def _note_left_behind(self) -> None:
        """Keep the last words of an earlier driver's roles before launching overwrites them."""
        for record in self.run_dir.role_records():
            key, life = f"{record['role']}-{record['index']}", record["incarnation"]
            counts = row_counts(record.get("payload", {}))
            self.run_dir.event(
                "role left behind", role=key, incarnation=life, state=record["state"], **counts
            )

    def _address(self, key: str) -> str:
        """Where a service answers, or last answered. A restarted one takes its old port again."""
        address = self.fleet.statuses()[key].address
        if address:
            self._addresses[key] = address
        return self._addresses[key]

    def _launch_ranks(self) -> None:
        """All ranks of the learner at once: they meet at a new place in each of their lives."""
        meeting = meeting_place(self.config.learner.ranks)
        for rank in range(self.config.learner.ranks):
            self._launch("learner", rank, meeting)

    def _launch(self, role: str, index: int, extra: Mapping[str, Any] | None = None) -> None:
        key = f"{role}-{index}"
        services = role in ("params", "shard")
        old = self._specs.get(key)
        port = 0
        if services and old is not None:
            port = int(self._address(key).rsplit(":", 1)[1])
        spec = RoleSpec(
            role=role,
            index=index,
            incarnation=self.run_dir.next_incarnation(role, index),
            run_dir=str(self.run_dir.path),
            config=self.config.model_dump(mode="json"),
            env_spec=self._env_spec.to_json(),
            params_address="" if services else self._address("params-0"),
            shard_addresses=()
            if services
            else tuple(self._address(f"shard-{i}") for i in range(self.config.shard_count)),
            port=port,
            extra=extra or {},
        )
        self.fleet.launch(spec)
        self._specs[key] = spec
        self.run_dir.event("role launched", role=role, index=index, incarnation=spec.incarnation)

    def _await_running(self, keys: list[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        waiting = list(keys)
        while waiting:
            statuses = self.fleet.statuses()
            for key in list(waiting):
                if statuses[key].state == "failed":
                    self._fail(key, statuses[key])
                if statuses[key].state == "running":
                    waiting.remove(key)
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"{', '.join(waiting)} did not start within {START_SECONDS:.0f} s; see "
                    f"{self.run_dir.logs}"
                )
            time.sleep(0.05)

    def _fail(self, key: str, status: RoleStatus) -> None:
        error = InfrastructureError(f"{key} failed: {status.error or 'no message'}")
        if status.exit_code in FATAL_EXIT_CODES:
            error.exit_code = status.exit_code
        self.run_dir.event("run failed", role=key, reason=status.error)
        raise error

    # -- watching ---------------------------------------------------------------------------------

    def step(self, seconds: float = 1.0) -> Progress:
        """Wait `seconds`, read every role, mend what broke, and return the progress.

        Raises: InfrastructureError when a role is beyond its restart budget or failed for good.
        """
        time.sleep(seconds)
        statuses = self.fleet.statuses()
        self._count(statuses)  # before mending: a relaunched role must not inherit its predecessor's counts
        for key, status in statuses.items():
            if not key.startswith("learner"):
                self._mend(key, status)
        self._mend_ranks({key: statuses[key] for key in rank_keys(self.config.learner.ranks)})
        self.progress.restarts = self._restart_total
        self._publish_targets(statuses)
        return self.progress

    def _mend(self, key: str, status: RoleStatus) -> None:
        now = time.monotonic()
        if self._draining and key.startswith("actor"):
            self._relaunch_at.pop(key, None)  # one that waits for its next life would collect for ever
            return
        if key in self._relaunch_at:
            if now >= self._relaunch_at[key]:
                del self._relaunch_at[key]
                role, index = key.rsplit("-", 1)
                self._launch(role, int(index))
            return
        if not end_of(status, self.config.silent_seconds):
            return
        if status.state != "failed":
            self.fleet.kill(key)
        self._lose(key, key, status)

    def _mend_ranks(self, statuses: Mapping[str, RoleStatus]) -> None:
        """As _mend for the learner, whose ranks end and begin together."""
        key = next(iter(statuses))  # rank 0 stands for all
        if key in self._relaunch_at:
            if time.monotonic() >= self._relaunch_at[key]:
                del self._relaunch_at[key]
                self._launch_ranks()
            return
        lost = {rank: word for rank, word in statuses.items() if end_of(word, self.config.silent_seconds)}
        if not lost or self._mourning.goes_on(statuses[key], time.monotonic()):
            return
        guilty = culprit(lost, FATAL_EXIT_CODES)
        for rank, status in statuses.items():
            if status.state in ("starting", "running"):
                self.fleet.kill(rank)
        self._lose(key, guilty, statuses[guilty])

    def _lose(self, key: str, guilty: str, status: RoleStatus) -> None:
        """Note why `key` ended and when it is launched again. `guilty`: itself, or the rank that it needs."""
        now = time.monotonic()
        if status.state == "failed" and status.exit_code in FATAL_EXIT_CODES:
            self._fail(guilty, status)
        recent = self._restarts[key]
        while recent and now - recent[0] > RESTART_WINDOW_SECONDS:
            recent.popleft()
        if len(recent) >= self.config.max_restarts:
            self._fail(guilty, status)
        delay = min(LONGEST_BACKOFF_SECONDS, 0.2 * 2 ** len(recent))
        recent.append(now)
        self._restart_total += 1
        self._restarts_new[key.rsplit("-", 1)[0]] += 1
        self._relaunch_at[key] = now + delay
        reason = end_of(status, self.config.silent_seconds)
        log.warning("role lost", extra={"role": guilty, "reason": reason, "delay": delay})
        self._note_end("role lost", guilty, status, reason=reason, restart_in=delay)

    def _note_end(self, event: str, key: str, status: RoleStatus, **details: Any) -> None:
        life = self._specs[key].incarnation
        self.run_dir.event(event, role=key, incarnation=life, **row_counts(status.payload), **details)

    def take_restarts(self) -> Counter[str]:
        """Restarts by role since the last call."""
        taken, self._restarts_new = self._restarts_new, Counter()
        return taken

    def _count(self, statuses: Mapping[str, RoleStatus]) -> None:
        now = time.monotonic()
        shards = [s.payload for k, s in statuses.items() if k.startswith("shard")]
        actors = {k: s for k, s in statuses.items() if k.startswith("actor")}
        learner = statuses["learner-0"].payload if "learner-0" in statuses else {}
        progress = Progress(seconds=now - self._began)
        progress.env_steps_asked = self.config.env_steps
        # A shard that is being restarted says nothing for a while: counters only grow.
        progress.env_steps = max(self.progress.env_steps, sum(int(s.get("inserted", 0)) for s in shards))
        progress.env_rate = self._env_rate.add(now, progress.env_steps)
        progress.updates = int(learner.get("updates", self.progress.updates))
        progress.update_rate = self._update_rate.add(now, progress.updates)
        progress.train_ratio = learner.get("train_ratio", self.progress.train_ratio)
        progress.train_ratio_asked = learner.get("train_ratio_asked", self.progress.train_ratio_asked)
        progress.alarms = tuple(learner.get("alarms", ()))
        progress.who_waits = str(learner.get("governor", {}).get("line", ""))
        progress.policy_version = int(learner.get("published", 0))
        progress.learner = learner.get("metrics", {})
        learning, rank_zero = self.config.learner, statuses.get("learner-0")
        nobody = awaited(learning.launch, learning.ranks, rank_zero, self.run_dir.path)
        progress.waiting = nobody or str(learner.get("waiting", ""))
        progress.actors = sum(s.state == "running" for s in actors.values())
        progress.restarts = self._restart_total
        lags = [float(s.payload["policy_lag"]) for s in actors.values() if "policy_lag" in s.payload]
        progress.policy_lag = sum(lags) / len(lags) if lags else 0.0
        for key, status in actors.items():
            self._take_episodes(f"{key}.{self._specs[key].incarnation}", status.payload, progress)
        progress.episodes = self.episodes
        progress.return_mean = sum(self._returns) / len(self._returns) if self._returns else None
        left = self.config.env_steps - progress.env_steps
        progress.eta_seconds = left / progress.env_rate if progress.env_rate > 0 else None
        if self.config.offline and self.config.updates is not None and progress.update_rate > 0:
            progress.eta_seconds = (self.config.updates - progress.updates) / progress.update_rate
        self.progress = progress

    def _take_episodes(self, life: str, payload: Mapping[str, Any], progress: Progress) -> None:
        """Episodes come as an ever-growing count plus the newest few, so no report is taken twice."""
        newest: list[Mapping[str, Any]] = list(payload.get("episodes", ()))
        total = int(payload.get("episodes_total", len(newest)))
        fresh = min(total - self._episodes_seen.get(life, 0), len(newest))
        self.episodes += max(0, total - self._episodes_seen.get(life, 0))
        self._episodes_seen[life] = total
        for episode in newest[len(newest) - fresh :] if fresh > 0 else ():
            self._returns.append(float(episode["score"]))
            self.curve.append(
                {
                    "env_steps": float(progress.env_steps),
                    "seconds": progress.seconds,
                    "return": float(episode["score"]),
                }
            )

    def _publish_targets(self, statuses: Mapping[str, RoleStatus]) -> None:
        """Prometheus file service discovery: every process of the run that serves /metrics."""
        targets = [
            {
                "targets": [f"{self.config.services.host}:{port}"],
                "labels": {
                    "run": self.config.name,
                    "role": key.rsplit("-", 1)[0],
                    "index": key.rsplit("-", 1)[1],
                },
            }
            for key, port in [
                *((key, status.metrics_port) for key, status in statuses.items()),
                ("driver-0", self.metrics_port),
            ]
            if port
        ]
        path = self.run_dir.path / "targets.json"
        if not path.exists() or json.loads(path.read_text()) != targets:
            self.run_dir.write_json(path, targets)

    # -- ending -----------------------------------------------------------------------------------

    @property
    def collected(self) -> bool:
        """True once enough rows are inserted, the updates are spent, or the time is up."""
        limit = self.config.max_seconds
        over = limit is not None and self.progress.seconds > limit
        return over or self._spent or self.progress.env_steps >= self.config.env_steps

    @property
    def _spent(self) -> bool:
        return self.config.updates is not None and self.progress.updates >= self.config.updates

    @property
    def finished(self) -> bool:
        """True once, after collecting, the learner has trained all it owes."""
        if not self.collected:
            return False
        if not self._draining:
            self._drain()
        learner = self.fleet.statuses()["learner-0"]
        limit = self.config.max_seconds
        if self._spent or (limit is not None and self.progress.seconds > limit):
            return True
        owed = float(learner.payload.get("owed_rows", float("inf")))
        # What it owes counts only once it has seen the last rows.
        seen = int(learner.payload.get("inserted", 0)) >= self.progress.env_steps
        return learner.state == "running" and seen and owed < self.config.batch_rows

    def _drain(self) -> None:
        """Stop the actors; their last chunks are acknowledged before they end."""
        self._draining = True
        self._stop_all("actor")
        self._count(self.fleet.statuses())
        self.run_dir.event("collection ended", env_steps=self.progress.env_steps)

    def _stop_all(self, role: str) -> None:
        """Stop all processes of a role side by side."""
        keys = [key for key in self._specs if key.startswith(f"{role}-")]
        with ThreadPoolExecutor(max_workers=min(32, max(1, len(keys)))) as pool:
            for key, status in zip(
                keys, pool.map(lambda k: self.fleet.stop(k, STOP_SECONDS[role]), keys), strict=True
            ):
                reason = {"reason": status.error} if status.state == "failed" else {}
                self._note_end("role lost" if reason else "role stopped", key, status, **reason)

    def stop(self) -> None:
        """Stop everything in flow order, the learner with a final checkpoint."""
        if not self._draining:
            self._drain()
        for role in ("learner", "shard", "params"):
            self._stop_all(role)
        self._count(self.fleet.statuses())
        self.run_dir.event("run stopped", env_steps=self.progress.env_steps, updates=self.progress.updates)
