"""Same state, different actions: do the model's futures differ, and are they the right ones?

The judge is a reference, another world model that knows the truth (`oracle.OracleModel`): both start from the
same rows and take the same actions. Letters: B starts, K futures of each, H steps, N = B * K, A action width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.evaluation.channels import Ruler, Values, channels, compared, read_values, true_values
from learner.evaluation.rows import Rows, at_row, map_leaves, observe
from learner.interfaces import ImaginedPolicy, Rollout, Space, Tree, WorldModel

FEWEST_STEPS = 3
"""A start counts when all its real futures stay in the episode for so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """Made by `counterfactual`, taken by reports."""

    futures: int  # K
    starts: int  # of those that count
    retrieval: float  # share of imagined futures whose nearest real future is their own; chance 1/K
    distinct: float  # share of pairs of real futures that differ at all
    spread: float  # how far imagined futures are from each other, over how far real ones are; right: 1
    noise_spread: float  # how far imagined futures differ under other random numbers, over the same

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"chance": 1.0 / self.futures}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanGap:
    """What a policy believes it will get, against what it gets. Made by `plan_gap`, taken by reports."""

    starts: int
    imagined_return: float  # mean undiscounted reward over the horizon
    real_return: float  # of the same actions, from the same states
    error: NDArray[np.float64]  # [H], open loop along the model's own plan
    copy: NDArray[np.float64]  # [H], of the row before the plan

    @property
    def gap(self) -> float:
        """Above 0: the policy exploits what the model gets wrong."""
        return self.imagined_return - self.real_return

    def to_json(self) -> dict[str, Any]:
        arrays = {name: [float(x) for x in getattr(self, name)] for name in ("error", "copy")}
        return asdict(self) | arrays | {"gap": self.gap}


def random_actions(space: Space, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform random actions [*lead, A] as models read them."""
    device = generator.device
    if space.kind != "discrete":
        return torch.rand((*lead, *space.shape), generator=generator, device=device) * 2.0 - 1.0
    parts = [torch.randint(n, lead, generator=generator, device=device) for n in space.classes]
    hot = [torch.nn.functional.one_hot(p, n) for p, n in zip(parts, space.classes, strict=True)]
    return torch.cat(hot, -1).float()


def repeated(tree: Tree, times: int) -> Tree:
    """Each entry of the leaves [B, ...] `times` in a row: [B * times, ...]."""
    return map_leaves(lambda leaf: leaf.repeat_interleave(times, 0), tree)


def alive(rollout: Rollout) -> Tensor:
    """[N, H] bool: rows reached before the episode ends; the row that ends it is one.

    A model that knows nothing of ends believes in none.
    """
    if "cont" not in rollout.out:
        return torch.ones(rollout.action.shape[:2], dtype=torch.bool, device=rollout.action.device)
    going = (rollout.out["cont"] > 0.5).long()
    return torch.cat([torch.ones_like(going[:, :1]), going[:, :-1].cumprod(1)], 1).bool()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """Model and reference in the same moment. Made by `_meet`."""

    state: Tree  # [B, ...], the model's
    truth: Tree  # [B, ...], the reference's
    ruler: Ruler
    keys: list[str]  # by which futures are told apart


def _meet(model: WorldModel, reference: WorldModel, rows: Rows, generator: torch.Generator) -> _Scene:
    """Both have seen the first `rows.seen` rows."""
    states = observe(model, rows, model.noise(rows.sequences, rows.time, generator))[1]
    own = rows.starting(reference.initial(rows.sequences))
    true_states = observe(reference, own, reference.noise(rows.sequences, rows.time, generator))[1]
    ruler = Ruler(
        channels(model),
        {key: value[:, rows.seen :] for key, value in true_values(model, rows.batch, states).items()},
        rows.inside,
    )
    at = rows.seen - 1
    return _Scene(state=at_row(states, at), truth=at_row(true_states, at), ruler=ruler, keys=compared(model))


def _as_seen(model: WorldModel, state: Tree, reference: WorldModel, real: Rollout, noise: Tree) -> Values:
    """The real future [N, H, ...] in the model's terms: its observations, and the features these give."""
    obs = reference.read(real.state, frozenset({"obs"}))["obs"]
    first = torch.zeros(real.action.shape[:2], dtype=torch.bool, device=real.action.device)
    if "decode" in model.caps:
        return {f"obs/{key}": value for key, value in obs.items()}
    states = model.observe(state, obs, real.action, first, noise)[1]
    return {"feat": model.read(states, frozenset({"feat"}))["feat"]}


@torch.no_grad()
def counterfactual(
    model: WorldModel,
    reference: WorldModel,
    rows: Rows,
    generator: torch.Generator,
    *,
    futures: int,
    horizon: int,
) -> Counterfactual:
    """Imagine `futures` random action sequences from each row `rows.seen - 1`, and ask what really follows.

    All futures of one start share their random numbers, so only the actions can tell them apart.
    """  # fmt: skip
    scene, size = _meet(model, reference, rows, generator), rows.sequences
    actions = random_actions(model.action_space, (size * futures, horizon), generator)
    noises = [repeated(model.noise(size, horizon, generator), futures) for _ in range(2)]
    state = repeated(scene.state, futures)
    real = reference.imagine(
        repeated(scene.truth, futures), horizon, actions, reference.noise(size * futures, horizon, generator)
    )
    truth = _as_seen(model, state, reference, real, noises[0])
    rolled = [model.imagine(state, horizon, actions, noise) for noise in noises]
    said, again = (read_values(model, rollout.state, rollout.out) for rollout in rolled)
    inside = alive(real).unflatten(0, (size, futures)).all(1).double()  # [B, H]
    counts = inside.sum(1) >= min(FEWEST_STEPS, horizon)  # [B]

    def apart(one: Values, other: Values) -> Tensor:
        """Mean squared distance [B, K, K] of every future of one from every future of the other."""
        columns = []
        for k in range(futures):
            turned = {  # future k of each start against every future of the same start
                key: other[key].unflatten(0, (size, futures))[:, k].repeat_interleave(futures, 0)
                for key in scene.keys
            }
            part = scene.ruler.distance(one, turned, scene.keys).unflatten(0, (size, futures))  # [B, K, H]
            columns.append((part * inside.unsqueeze(1)).sum(-1))
        return torch.stack(columns, -1)[counts]

    crossed, among_real, among_said = apart(said, truth), apart(truth, truth), apart(said, said)
    own = crossed.diagonal(dim1=1, dim2=2)
    pairs = ~torch.eye(futures, dtype=torch.bool, device=own.device)
    drawn = apart(said, again).diagonal(dim1=1, dim2=2)
    real_spread = float(among_real[:, pairs].mean().sqrt()) if counts.any() else float("nan")
    return Counterfactual(
        futures=futures,
        starts=int(counts.sum()),
        retrieval=float((own <= crossed.amin(2)).double().mean()) if counts.any() else float("nan"),
        distinct=float((among_real[:, pairs] > 0).double().mean()) if counts.any() else float("nan"),
        spread=float(among_said[:, pairs].mean().sqrt()) / max(real_spread, 1e-12),
        noise_spread=float(drawn.mean().sqrt()) / max(real_spread, 1e-12),
    )


@torch.no_grad()
def plan_gap(
    model: WorldModel,
    reference: WorldModel,
    rows: Rows,
    policy: ImaginedPolicy,
    generator: torch.Generator,
    *,
    horizon: int,
) -> PlanGap:
    """Let `policy` choose each step in the model's imagination, then do the same for real.

    The error along the plan is that under interventions: every action answers what the model imagined before.
    """  # fmt: skip
    scene, size = _meet(model, reference, rows, generator), rows.sequences
    noise = model.noise(size, horizon, generator)
    rollout = model.imagine(scene.state, horizon, policy, noise)
    real = reference.imagine(scene.truth, horizon, rollout.action, reference.noise(size, horizon, generator))
    truth = _as_seen(model, scene.state, reference, real, noise)
    said = read_values(model, rollout.state, rollout.out)
    start = {key: value.unsqueeze(1) for key, value in _start_values(model, reference, scene).items()}
    last = {key: start[key].expand_as(truth[key]) for key in scene.keys}
    inside = alive(real).double()

    def error(values: Values) -> NDArray[np.float64]:
        part = scene.ruler.distance(truth, values, scene.keys)  # [B, H]
        return ((part * inside).sum(0) / inside.sum(0).clamp_min(1.0)).sqrt().cpu().numpy()

    return PlanGap(
        starts=size,
        imagined_return=_return(rollout),
        real_return=_return(real),
        error=error(said),
        copy=error(last),
    )


def _start_values(model: WorldModel, reference: WorldModel, scene: _Scene) -> Values:
    """What both see before the plan, [B, ...] per channel."""
    if "decode" not in model.caps:
        return {"feat": model.read(scene.state, frozenset({"feat"}))["feat"]}
    obs = reference.read(scene.truth, frozenset({"obs"}))["obs"]
    return {f"obs/{key}": value for key, value in obs.items()}


def _return(rollout: Rollout) -> float:
    return float((rollout.out["reward"] * alive(rollout)).sum(1).double().mean())


@torch.no_grad()
def recall(
    model: WorldModel, reference: WorldModel, rows: Rows, arms: Tensor, generator: torch.Generator
) -> float:
    """Share of sequences where, of two last actions, the model expects more from the one that pays more.

    rows: whatever had to be remembered, up to the row before the choice (`rows.seen`); arms [2, A]. A tie of
    expected rewards counts half, so who forgot scores one half. Persistence is this against the length.
    """
    scene, size = _meet(model, reference, rows, generator), rows.sequences
    noise = model.noise(size, 1, generator)
    told: list[Tensor] = []
    for who, state, drawn in (
        (model, scene.state, noise),
        (reference, scene.truth, reference.noise(size, 1, generator)),
    ):
        rewards = [
            who.imagine(state, 1, arm.expand(size, 1, -1), drawn).out["reward"][:, 0].double() for arm in arms
        ]
        told.append(rewards[0] - rewards[1])  # [B]
    right = (told[0].sign() == told[1].sign()).double()
    return float(torch.where(told[0] == 0, torch.full_like(right, 0.5), right).mean())
