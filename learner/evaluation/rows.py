"""Real rows to judge a model on, and how trees of tensors are cut and joined. First stop of the evaluation.

Letters: B sequences, T rows, H = T - seen predicted rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from learner.interfaces import Tree, WorldModel
from system.errors import ConfigError
from system.experience import Sequence


class Predictor(Protocol):
    """An agent whose world model can be looked into."""

    @property
    def model(self) -> WorldModel: ...
    def prepare(self, sequence: Sequence) -> tuple[Tree, Tree]: ...  # (rows [B, T, ...], state before them)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Real rows of B sequences. Made by `rows_of` and `oracle.simulated_rows`, taken by every measurement."""

    batch: Tree  # [B, T, ...]: obs {key}, prev_action [B, T, A], reward, is_first, is_terminal [B, T]
    start: Tree  # [B, ...], a model's state before row 0
    seen: int  # rows that the model sees before it must predict

    @property
    def sequences(self) -> int:
        return int(self.batch["is_first"].shape[0])

    @property
    def time(self) -> int:
        return int(self.batch["is_first"].shape[1])

    @property
    def horizon(self) -> int:
        return self.time - self.seen

    @property
    def actions(self) -> Tensor:
        """[B, H, A]; the action before row t leads to it."""
        return self.batch["prev_action"][:, self.seen :]

    @property
    def inside(self) -> Tensor:
        """[B, H] bool: rows still inside the episode that the model saw."""
        return torch.cumprod((~self.batch["is_first"][:, self.seen :]).long(), 1).bool()

    def starting(self, start: Tree) -> Rows:
        """The same rows for another model, from its own state [B, ...]."""
        return Rows(batch=self.batch, start=start, seen=self.seen)


def check_seen(seen: int, time: int) -> None:
    """Raises: ConfigError when `seen` of `time` rows leave nothing to see or nothing to predict."""
    if not 0 < seen < time:
        raise ConfigError(
            f"open-loop context ({seen}) must be between 1 and {time - 1} for sequences of {time} trained "
            "rows; change it or sample longer sequences"
        )


def rows_of(agent: Predictor, sequence: Sequence, seen: int) -> Rows:
    """The trained rows of a replay sequence. Raises: ConfigError as `check_seen`."""
    batch, start = agent.prepare(sequence)
    check_seen(seen, batch["is_first"].shape[1])
    return Rows(batch=batch, start=start, seen=seen)


def map_leaves(change: Callable[..., Any], tree: Tree, *more: Tree) -> Tree:
    """The tree with `change` applied to each leaf, and to the same leaves of `more`."""
    return {
        key: map_leaves(change, value, *(other[key] for other in more))
        if isinstance(value, dict)
        else change(value, *(other[key] for other in more))
        for key, value in tree.items()
    }


def leaves(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in the order of their keys."""
    found: list[Tensor] = []
    for key in sorted(tree):
        found += leaves(tree[key]) if isinstance(tree[key], dict) else [tree[key]]
    return found


def at_row(states: Tree, row: int) -> Tree:
    """The states [B, ...] of one row of [B, T, ...]."""
    return map_leaves(lambda leaf: leaf[:, row], states)


def observe(model: WorldModel, rows: Rows, noise: Tree, *, stop: int | None = None) -> tuple[Tree, Tree]:
    """(carry after, states [B, T, ...] of) the rows before `stop`; noise [B, T, ...]."""
    batch = rows.batch

    def cut(leaf: Tensor) -> Tensor:
        return leaf[:, :stop]

    return model.observe(
        rows.start, map_leaves(cut, batch["obs"]), cut(batch["prev_action"]), cut(batch["is_first"]),
        map_leaves(cut, noise),
    )  # fmt: skip
