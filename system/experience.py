"""Experience in motion: the carriers that travel from environments to replay and on to the learner.

Row t of a stream holds obs_t, the reward and flags received *on arriving* at obs_t, and the action
chosen there. The first row of an episode has is_first and reward 0; its last row has is_last, the
true final obs and an all-zero action. is_terminal implies is_last and means the return ends there
(continue 0); a time limit is is_last alone. Every row carries its identity, so stores are
exactly-once: (stream, incarnation, episode, step).

Letters: n rows of one recv, B batch, T time, N environments of one actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Made by VectorEnv.recv, taken by the environment loop and Policy.act. env_id has no repeats."""

    env_id: NDArray[np.int32]  # [n]
    obs: Columns  # each [n, ...]
    reward: NDArray[np.float32]  # [n]
    is_first: NDArray[np.bool_]  # [n]
    is_last: NDArray[np.bool_]  # [n]
    is_terminal: NDArray[np.bool_]  # [n]
    log: Columns = field(default_factory=dict[str, NDArray[np.generic]])  # each [n, ...], never stored

    def __len__(self) -> int:
        return len(self.env_id)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class StreamId:
    """One endless sequence of rows: one environment of one actor."""

    actor: int
    env: int

    def __str__(self) -> str:
        return f"a{self.actor}e{self.env}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive rows of one stream. Made by the actor, taken by ReplayWriter.append.

    `columns` has every name of TableSpec.all, each [T, ...]; the identity columns incarnation,
    episode and step are among them and grow by one row at a time (step + 1, or the next episode
    at step 0 after is_last).

    `continues` says that rows between the store's newest ones and these may be elsewhere or lost: the
    stream came from another shard. The store then lets no sequence span the two.
    """

    stream: StreamId
    columns: Columns  # each [T, ...]
    continues: bool = False

    def __len__(self) -> int:
        return len(self.columns["reward"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Answer to an append: rows durable against process death, and rows dropped as already stored."""

    committed: int
    duplicates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceIds:
    """Where sampled sequences lie. A stream's row positions are never reused, so a late write-back
    to an evicted position is recognised by position alone.
    """

    shard: NDArray[np.int32]  # [B]
    stream: NDArray[np.int32]  # [B], slot of the stream inside its shard
    start: NDArray[np.int64]  # [B], position of row 0 in the stream
    source: NDArray[np.int8] | None = None  # [B], which named source; None when there is only one


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Made by ReplayReader.sample, taken by Agent.learn. Row 0..context-1 is replay context.

    `columns` holds every table and overlay column, each [B, T, ...]. Its arrays belong to the reader
    and stay valid until the reader's ring comes round again: copy before keeping them. All other
    arrays are made for this batch.
    """

    columns: Columns
    ids: SequenceIds
    context: int = 0
    weights: NDArray[np.float32] | None = None  # [B], importance weights, the largest is 1; None: all alike
    goal: Columns | None = None  # each [B, ...], a row at or after the last one, of the same episode

    @property
    def shape(self) -> tuple[int, int]:
        batch, time = self.columns["reward"].shape
        return int(batch), int(time)

    @property
    def source(self) -> NDArray[np.int8] | None:
        """Which named source each sequence is from [B]; None when there is only one."""
        return self.ids.source


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBack:
    """New values for overlay columns of sampled rows. Made by Agent.learn, taken by the replay reader.

    `columns` values are [B, L, ...] for the rows start + offset ... start + offset + L - 1 of `ids`.
    """

    ids: SequenceIds
    offset: int
    columns: Columns
    priority: NDArray[np.float32] | None = None  # [B, L], finite and >= 0: how much a row is worth replaying


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeStats:
    """One finished episode as seen by the environment loop."""

    env_id: int
    length: int  # environment steps, reset row not counted
    score: float  # undiscounted sum of rewards
    terminal: bool
    policy_version: int
