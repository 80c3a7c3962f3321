"""The processes of a run as plain classes: params server, replay shard, actor, learner.

Each has start() -> address, work(seconds) -> status and stop(). `local` runs one per operating-system
process, `ray_fleet` one per Ray actor; both call exactly these. A RoleSpec is everything a role needs,
as plain values, so it can cross any wire.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from deploy import assemble
from deploy.run_config import RunConfig
from system.errors import PreflightError
from system.heap import keep_freed_memory
from system.metrics import Metrics
from system.specs import EnvSpec

Server = TypeVar("Server")
PORT_SECONDS = 10.0
EPISODES_REPORTED = 256
"""Newest episodes in each report; the driver reads more often than these turn over."""
ROLE_NAMES = ("params", "shard", "learner", "actor")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """Made by the driver, taken by a backend. JSON-able."""

    role: str
    index: int
    incarnation: int
    run_dir: str
    config: Mapping[str, Any]
    env_spec: Mapping[str, Any]
    params_address: str = ""
    shard_addresses: tuple[str, ...] = ()
    port: int = 0  # asked port of a service; a restarted one asks for the port it had
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def key(self) -> str:
        return f"{self.role}-{self.index}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RoleSpec:
        values = json.loads(text)
        values["shard_addresses"] = tuple(values["shard_addresses"])
        return cls(**values)

    def run_config(self) -> RunConfig:
        return RunConfig.model_validate(self.config)


class Role(Protocol):
    """One long-lived process of a run."""

    def start(self) -> dict[str, Any]: ...
    def work(self, seconds: float) -> dict[str, Any]: ...
    def stop(self) -> dict[str, Any]: ...


def _bind(serve: Callable[[], Server], spec: RoleSpec) -> Server:
    """Serve; a restarted service waits a while for the port of its former life, which its peers know.

    Raises: PreflightError when the port stays taken.
    """
    deadline = time.monotonic() + (PORT_SECONDS if spec.port else 0.0)
    while True:
        try:
            return serve()
        except PreflightError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


class ParamsRole:
    """Holds the newest policy versions and streams them to actors."""

    def __init__(self, spec: RoleSpec) -> None:
        self._spec, self._config = spec, spec.run_config()
        self.metrics = Metrics(self._config.name, "params", spec.index)

    def start(self) -> dict[str, Any]:
        port = self._spec.port or self._config.services.params_port
        self._server = _bind(lambda: assemble.params_server(self._config, port, self.metrics), self._spec)
        return {"address": f"{self._config.services.host}:{self._server.port}"}

    def work(self, seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return {"version": self.metrics.value("params_version")}

    def stop(self) -> dict[str, Any]:
        self._server.stop()
        return {}


class ShardRole:
    """Owns one replay directory; appends arrive by gRPC, learners on the node map the files."""

    def __init__(self, spec: RoleSpec) -> None:
        self._spec, self._config = spec, spec.run_config()
        self.metrics = Metrics(self._config.name, "replay", spec.index)

    def start(self) -> dict[str, Any]:
        env_spec = EnvSpec.from_json(self._spec.env_spec)
        spec, config = self._spec, self._config
        keep_freed_memory(one_heap=True)
        self._shard = assemble.replay_shard(config, env_spec, spec.run_dir, spec.index, self.metrics)
        self._server = _bind(lambda: assemble.shard_server(config, self._shard, spec.port), spec)
        return {"address": f"{self._config.services.host}:{self._server.port}", **self._status()}

    def _status(self) -> dict[str, Any]:
        return asdict(self._shard.stats())

    def work(self, seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return self._status()

    def stop(self) -> dict[str, Any]:
        self._server.stop()
        status = self._status()
        self._shard.close()
        return status


class ActorRole:
    """Steps environments with the newest policy and sends acknowledged chunks to its home shard."""

    def __init__(self, spec: RoleSpec) -> None:
        self._spec, self._config = spec, spec.run_config()
        self.metrics = Metrics(self._config.name, "actor", spec.index)
        self._totals: dict[str, int] = {}
        self._episodes: deque[dict[str, float]] = deque(maxlen=EPISODES_REPORTED)
        self._episodes_total = 0

    def start(self) -> dict[str, Any]:
        self._actor = assemble.actor(
            self._config,
            EnvSpec.from_json(self._spec.env_spec),
            self._spec.index,
            self._spec.incarnation,
            self._spec.params_address,
            self._spec.shard_addresses,
            self.metrics,
        )
        return {}

    def work(self, seconds: float) -> dict[str, Any]:
        report = self._actor.run(seconds)
        self._episodes_total += len(report.episodes)
        self._episodes.extend({"score": e.score, "length": e.length} for e in report.episodes)
        for name, count in (("rows", report.rows), ("acknowledged", report.acknowledged)):
            self._totals[name] = self._totals.get(name, 0) + count
        return {
            **self._totals,
            "episodes_total": self._episodes_total,
            "episodes": list(self._episodes),
            "policy_version": report.policy_version.counter,
            "policy_lag": report.lag,
            "weights_age": report.weights_age,
            "pending": report.pending,
            "waits": dict(report.waits),
            "restarts": dict(report.restarts),
        }

    def stop(self) -> dict[str, Any]:
        return {"lost": self._actor.close()}


def make_role(spec: RoleSpec) -> Role:
    """The role a spec describes, not yet started."""
    if spec.role == "learner":
        from deploy.learner_ranks import RankRole  # torch stays out of every other process
        from deploy.learner_role import LearnerRole

        return RankRole(spec) if spec.index else LearnerRole(spec)
    roles: dict[str, Any] = {"params": ParamsRole, "shard": ShardRole, "actor": ActorRole}
    return roles[spec.role](spec)
