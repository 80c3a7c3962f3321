"""The contracts inside the learner: what a world model, a behavior and a training stage are.

Families are written against these, so the update loop, the checkpoints and the evaluation know none of them.
Row convention (`system.experience`): obs_t, the reward and flags received on arriving at it, then action_t.
Hence reward and continuation belong to the transition: `step(s_t, a_t)` returns them with s_{t+1}.

Letters: B batch, T time, N imagined trajectories, H horizon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from replay.batch_spec import BatchSpec
from system.errors import ConfigError
from system.specs import ActionSpec, ArraySpec

Tree = dict[str, Any]
"""Nested dict of tensors, batch axis first; every leaf can be tiled and gathered along it."""

Mode = Literal["train", "eval"]
Capability = Literal["step", "reward", "cont", "value", "prior", "decode", "embed", "infer", "passive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The channel a model or behavior really uses; an Adapter maps it to the environment's."""

    kind: Literal["discrete", "box", "image", "latent", "macro", "condition", "none"]
    shape: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()  # discrete only: one entry per component


def obs_space(spec: ArraySpec) -> Space:
    """One observation array as a model channel."""
    if spec.kind == "discrete":
        return Space(kind="discrete", shape=spec.shape, classes=(spec.classes,))
    return Space(kind="image" if spec.kind == "image" else "box", shape=spec.shape)


def action_space(spec: ActionSpec) -> Space:
    """The action as models read it."""
    kind = "discrete" if spec.kind == "discrete" else "box"
    return Space(kind=kind, shape=(spec.width,), classes=spec.classes)


@dataclass(slots=True, kw_only=True)
class LossOut:
    """One loss evaluation. Made by Trainable.loss, taken by the agent that owns the optimiser."""

    total: Tensor  # [], differentiable
    metrics: dict[str, Tensor]  # each [], detached
    states: Tree = field(default_factory=dict)  # [B, T, ...], with gradient
    rows: Tree = field(default_factory=dict)  # [B, T, ...], written back to replay


@dataclass(slots=True, kw_only=True)
class Rollout:
    """An imagined future. The start is not in it: state[:, h] is reached by action[:, h]."""

    state: Tree  # [N, H, ...]
    action: Tensor  # [N, H, A]
    out: Tree  # [N, H, ...]; out["reward"], out["cont"] belong to the arrived state
    feat: Tensor  # [N, H + 1, F], the start included: what critics and policies read


ImaginedPolicy = Callable[[Tree, int], Tensor]
"""Chooses the action [N, A] in state [N, ...] at imagined step h; closes over its own noise."""


class Trainable(Protocol):
    """Anything with parameters and a loss: a world model, a tokenizer, a behavior."""

    def groups(self) -> dict[str, list[nn.Parameter]]: ...  # one optimiser each
    def after_step(self, applied: Tensor) -> None:
        """EMA targets, codebooks: once after each update; applied [] bool, False changes nothing."""
        ...


class WorldModel(Trainable, Protocol):
    """Predicts what follows from what was seen and done. Random numbers are inputs, drawn by `noise`."""

    caps: frozenset[Capability]
    obs_space: dict[str, Space]
    action_space: Space

    def noise(self, batch: int, time: int, generator: torch.Generator) -> Tree: ...
    def loss(self, batch: Tree, carry: Tree, noise: Tree) -> LossOut: ...
    def initial(self, batch: int) -> Tree: ...
    def observe(
        self, carry: Tree, obs: Tree, prev_action: Tensor, is_first: Tensor, noise: Tree
    ) -> tuple[Tree, Tree]:
        """obs, prev_action, is_first [B, T, ...] -> (carry after row T, states [B, T, ...]). T >= 1."""
        ...

    def step(self, state: Tree, action: Tensor, noise: Tree) -> tuple[Tree, Tree]: ...  # one transition
    def imagine(
        self, state: Tree, horizon: int, policy: ImaginedPolicy | Tensor, noise: Tree
    ) -> Rollout: ...  # a Tensor [N, H, A] is a given action sequence
    def read(self, state: Tree, what: frozenset[str]) -> Tree: ...  # feat, obs, reward, cont, value


class Behavior(Trainable, Protocol):
    """Turns a world model into actions: actor-critic, planner, search, evolved controller."""

    needs: frozenset[Capability]  # checked against WorldModel.caps when a job is composed
    actor_keys: tuple[str, ...]  # prefixes of the weight names that go to actors

    def noise(self, batch: int, time: int, generator: torch.Generator) -> Tree: ...
    def loss(self, model: Any, batch: Tree, states: Tree, noise: Tree) -> LossOut: ...
    def act(self, feat: Tensor, noise: Tensor, mode: Mode) -> Tensor: ...


class Adapter(Protocol):
    """Maps between the action channel of the environment (rows) and that of the model."""

    def to_model(self, action: Tensor) -> Tensor: ...
    def to_env(self, action: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What trains, on which batches, until when, collecting how. DreamerV3 is one stage."""

    name: str
    train: tuple[str, ...]
    spec: BatchSpec  # what it asks of replay
    until: int  # updates; 0 means until the run ends
    collect: Literal["off", "random", "policy"] = "policy"
    then: tuple[str, ...] = ()


def check_needs(behavior: str, needs: frozenset[Capability], model: str, caps: frozenset[Capability]) -> None:
    """Refuse a pair that cannot work. Raises: ConfigError naming what the model lacks."""
    if missing := needs - caps:
        raise ConfigError(
            f"behavior {behavior!r} needs {sorted(missing)} but world model {model!r} has {sorted(caps)}; "
            "choose another behavior or a model with these capabilities"
        )
