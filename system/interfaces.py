"""The contracts, on one screen. Every one has an in-memory implementation and a conformance suite.

Data flows VectorEnv -> Policy -> ReplayWriter | ReplayReader -> Agent -> WeightSink | WeightSource
-> Policy. What each carrier holds is in `system.experience` and `system.weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from system.experience import Ack, Chunk, Sequence, Step, WriteBack
from system.specs import ArraySpec, EnvSpec
from system.weights import PolicyVersion, Weights

Mode = Literal["train", "eval"]


@runtime_checkable
class VectorEnv(Protocol):
    """N environments behind one send/recv pair. Each row that is not is_last wants exactly one
    action; ended environments reset themselves and show an is_first row next.
    """

    spec: EnvSpec
    num_envs: int

    def start(self, seed: int) -> None: ...
    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None: ...
    def recv(self, timeout: float) -> Step: ...
    def render(self, env_id: int) -> NDArray[np.uint8] | None: ...
    def close(self) -> None: ...


class Policy(Protocol):
    """All an actor knows of a model. `extras` are the overlay columns declared by `columns`."""

    columns: Mapping[str, ArraySpec]
    version: PolicyVersion

    def initial(self, num_envs: int) -> Any: ...
    def act(
        self, carry: Any, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], Any, dict[str, NDArray[np.generic]]]: ...
    def load(self, weights: Weights) -> None: ...


class ReplayWriter(Protocol):
    """Appends are acknowledged when they survive the death of any process; repeats are dropped.

    Raises: RejectedError for rows that break the schema or the identity order,
    DeadlineError when the limiter or an unreachable shard held the rows for `timeout` seconds
    (the rows may then be sent again).
    """

    def append(self, chunks: list[Chunk], timeout: float) -> Ack: ...
    def close(self) -> None: ...


class ReplayReader(Protocol):
    """Samples sequences over all shards. Raises: DeadlineError when the limiter says wait too long."""

    def sample(self, timeout: float) -> Sequence: ...
    def write_back(self, rows: WriteBack) -> int: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Agent(Protocol):
    """A learning agent: one update per call, on [B, T] sequences."""

    def initial(self, batch: int) -> Any: ...
    def learn(self, sequence: Sequence, carry: Any) -> tuple[Any, dict[str, float], WriteBack | None]: ...
    def weights(self) -> dict[str, NDArray[np.generic]]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


class WeightSink(Protocol):
    """Where the learner publishes. Raises: RejectedError for a version not newer than the last.

    `newest` lets a learner notice that a restarted store forgot what was published.
    """

    def publish(self, weights: Weights) -> None: ...
    def newest(self, timeout: float) -> PolicyVersion: ...


class WeightSource(Protocol):
    """Where actors look for newer weights; None when `newer_than` is still the newest."""

    def latest(self, newer_than: PolicyVersion, timeout: float) -> Weights | None: ...
