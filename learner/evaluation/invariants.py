"""What must hold of any world model, trained or not: it knows no future, leaks nothing between sequences,
forgets at a reset, repeats itself under the same random numbers, and listens.

Bit-equal means `torch.equal`: the shapes of both computations are the same, so rounding is no excuse.
Letters: B sequences, T rows, H = T - seen predicted rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learner.evaluation.rows import Rows, at_row, leaves, map_leaves, observe
from learner.interfaces import Rollout, Space, Tree, WorldModel

NEAR = 1e-3
"""Entries further apart than this, relative to the largest, differ where bits may."""
FEW = 0.01
"""Share of them that may: a categorical sample near the edge of its class falls on the other side."""
STEPS = 5
"""Steps over which single steps are compared with a rollout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must hold. Made here and by `harness`, taken by reports."""

    name: str
    passed: bool
    value: float
    rule: str  # what `value` is, and what it must be

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def invariants(model: WorldModel, rows: Rows, generator: torch.Generator) -> list[Check]:
    """All checks of this file on real rows. Needs two sequences and three rows."""
    noise = model.noise(rows.sequences, rows.time, generator)
    states = observe(model, rows, noise)[1]
    ahead = model.noise(rows.sequences, rows.horizon, generator)
    start = at_row(states, rows.seen - 1)
    rollout = model.imagine(start, rows.horizon, rows.actions, ahead)
    found = [
        *_observing_is_causal(model, rows, noise, states),
        *_imagining_is_causal(model, rows, start, ahead, rollout),
        _isolation(model, rows, noise, states),
        _reset(model, rows, noise),
        *_determinism(model, rows, noise, states, start, ahead, rollout),
        _pieces(model, rows, noise, states),
    ]
    return [*found, _single_steps(model, rows, start, ahead, rollout)] if "step" in model.caps else found


def other_obs(obs: Tree, spaces: dict[str, Space]) -> Tree:
    """Other observations of the same kinds, different in every entry."""

    def change(key: str, value: Tensor) -> Tensor:
        kind = spaces[key].kind
        if kind == "image":
            return 255 - value
        return (value + 1) % spaces[key].classes[0] if kind == "discrete" else 0.5 - 1.5 * value

    return {key: change(key, value) for key, value in obs.items()}


def other_actions(action: Tensor, space: Space) -> Tensor:
    """Other actions [..., A]: the next class of every component, or 0.75 away within [-1, 1]."""
    if space.kind == "discrete":
        return torch.cat([part.roll(1, -1) for part in action.split(space.classes, -1)], -1)
    return torch.where(action >= 0.0, action - 0.75, action + 0.75)


def _altered(model: WorldModel, rows: Rows, mask: Tensor, what: frozenset[str]) -> Rows:
    """The rows with `what` (obs, prev_action, is_first) changed where mask [B, T] says so."""

    def put(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(mask.view(*mask.shape, *[1] * (old.dim() - 2)), new, old)

    batch = dict(rows.batch)
    if "obs" in what:
        batch["obs"] = map_leaves(put, other_obs(batch["obs"], model.obs_space), batch["obs"])
    if "prev_action" in what:
        batch["prev_action"] = put(
            other_actions(batch["prev_action"], model.action_space), batch["prev_action"]
        )
    if "is_first" in what:
        batch["is_first"] = put(~batch["is_first"], batch["is_first"])
    return replace(rows, batch=batch)


def _differ(one: Tree, other: Tree, cut: Callable[[Tensor], Tensor]) -> float:
    """Largest difference of two trees where `cut` looks: 0 when bit-equal, infinite where NaN is."""
    worst = 0.0
    for a, b in zip(leaves(one), leaves(other), strict=True):
        a, b = cut(a), cut(b)
        if not torch.equal(a, b):
            gap = float((a.double() - b.double()).abs().max())
            worst = max(worst, gap if gap > 0 else float("inf"))
    return worst


def _same(name: str, value: float, rule: str) -> Check:
    return Check(name=name, passed=value == 0.0, value=value, rule=f"{rule}; must be 0")


def _moves(name: str, value: float, rule: str) -> Check:
    return Check(name=name, passed=value > 0.0, value=value, rule=f"{rule}; must be above 0")


def _observing_is_causal(model: WorldModel, rows: Rows, noise: Tree, states: Tree) -> list[Check]:
    """Rows up to a cut must not know what comes behind it; the row at the cut must know its observation."""
    worst, hears = 0.0, float("inf")
    everything = frozenset({"obs", "prev_action", "is_first"})
    numbers = torch.arange(rows.time, device=rows.batch["is_first"].device).expand(rows.sequences, -1)
    for cut in sorted({1, rows.time // 2, rows.time - 1}):
        after = observe(model, _altered(model, rows, numbers >= cut, everything), noise)[1]
        worst = max(worst, _differ(states, after, lambda leaf, at=cut: leaf[:, :at]))
        seen = observe(model, _altered(model, rows, numbers == cut, frozenset({"obs"})), noise)[1]
        hears = min(hears, _differ(states, seen, lambda leaf, at=cut: leaf[:, at]))
    return [
        _same("causality/observe", worst, "change of states before other observations, actions and resets"),
        _moves("listens/observation", hears, "change of the state of a row with another observation"),
    ]


def _imagining_is_causal(
    model: WorldModel, rows: Rows, start: Tree, noise: Tree, rollout: Rollout
) -> list[Check]:
    worst, hears = 0.0, float("inf")
    for cut in sorted({0, rows.horizon // 2, rows.horizon - 1}):
        actions = rows.actions.clone()
        actions[:, cut:] = other_actions(actions[:, cut:], model.action_space)
        other = model.imagine(start, rows.horizon, actions, noise)
        before = [_differ(a, b, lambda leaf, at=cut: leaf[:, :at]) for a, b in _parts(rollout, other)]
        worst = max(worst, *before)
        hears = min(hears, _differ(rollout.state, other.state, lambda leaf, at=cut: leaf[:, at:]))
    return [
        _same("causality/imagine", worst, "change of imagined rows before another action"),
        _moves("listens/action", hears, "change of imagined states from another action on"),
    ]


def _parts(one: Rollout, other: Rollout) -> list[tuple[Tree, Tree]]:
    return [
        (one.state, other.state),
        (one.out, other.out),
        ({"feat": one.feat[:, 1:]}, {"feat": other.feat[:, 1:]}),
    ]


def _isolation(model: WorldModel, rows: Rows, noise: Tree, states: Tree) -> Check:
    mask = torch.zeros_like(rows.batch["is_first"])
    mask[0] = True
    altered = _altered(model, rows, mask, frozenset({"obs", "prev_action"}))
    after = observe(model, altered, noise)[1]
    return _same(
        "isolation", _differ(states, after, lambda leaf: leaf[1:]), "change of sequences beside a changed one"
    )


def _reset(model: WorldModel, rows: Rows, noise: Tree) -> Check:
    """Two different pasts before one first row: its state and those after it must be the same."""
    first = rows.time // 2
    batch = dict(rows.batch)
    batch["is_first"] = batch["is_first"].clone()
    batch["is_first"][:, first] = True
    one = replace(rows, batch=batch, start=map_leaves(lambda leaf: leaf.roll(1, 0), rows.start))
    numbers = torch.arange(rows.time, device=batch["is_first"].device).expand(rows.sequences, -1)
    other = _altered(model, one, numbers < first, frozenset({"obs"}))
    other = _altered(model, other, numbers <= first, frozenset({"prev_action"}))
    states, after = (observe(model, past, noise)[1] for past in (one, replace(other, start=rows.start)))
    value = _differ(states, after, lambda leaf: leaf[:, first:])
    return _same("reset", value, "change of states after a first row with another past")


def _determinism(
    model: WorldModel, rows: Rows, noise: Tree, states: Tree, start: Tree, ahead: Tree, rollout: Rollout
) -> list[Check]:
    def whole(leaf: Tensor) -> Tensor:
        return leaf

    again = observe(model, rows, noise)[1]
    other = model.imagine(start, rows.horizon, rows.actions, ahead)
    repeated = max(_differ(a, b, whole) for a, b in _parts(rollout, other))
    rule = "change when repeated with the same random numbers"
    return [
        _same("determinism/observe", _differ(states, again, whole), rule),
        _same("determinism/imagine", repeated, rule),
    ]


def _far_apart(one: Tree, other: Tree) -> float:
    """Share of entries that differ by more than rounding can."""
    apart, count = 0, 0
    for a, b in zip(leaves(one), leaves(other), strict=True):
        a, b = a.double(), b.double()
        apart += int(((a - b).abs() > NEAR * a.abs().max().clamp_min(1.0)).sum())
        apart += int((a.isnan() | b.isnan()).sum())
        count += a.numel()
    return apart / max(1, count)


def _pieces(model: WorldModel, rows: Rows, noise: Tree, states: Tree) -> Check:
    """Actors see one row at a time, the learner many: both must have the same state."""
    carry, _ = observe(model, rows, noise, stop=rows.time - 1)
    batch = rows.batch

    def last(leaf: Tensor) -> Tensor:
        return leaf[:, -1:]

    one = model.observe(
        carry, map_leaves(last, batch["obs"]), last(batch["prev_action"]), last(batch["is_first"]),
        map_leaves(last, noise),
    )[1]  # fmt: skip
    value = _far_apart(map_leaves(last, states), one)
    rule = f"share of entries that differ when the last row is seen alone; must be at most {FEW}"
    return Check(name="agreement/observe", passed=value <= FEW, value=value, rule=rule)


def _single_steps(model: WorldModel, rows: Rows, start: Tree, noise: Tree, rollout: Rollout) -> Check:
    state, worst = start, 0.0
    for h in range(min(STEPS, rows.horizon)):
        state, out = model.step(state, rows.actions[:, h], at_row(noise, h))
        shared = {key: state[key] for key in state.keys() & rollout.state.keys()}
        worst = max(worst, _far_apart(shared, at_row({key: rollout.state[key] for key in shared}, h)))
        worst = max(worst, _far_apart(out, at_row({key: rollout.out[key] for key in out}, h)))
    rule = f"share of entries that differ between steps and a rollout; must be at most {FEW}"
    return Check(name="agreement/step", passed=worst <= FEW, value=worst, rule=rule)
