"""The weights of imagination as its chunks read them: side by side what is read side by side.

Made anew for every imagination, since weights change; the copies are small beside what they multiply.

Letters: see `learner.nn.imagine`; besides l layers side by side, P = K + 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from learner.nn.action_distribution import ActionDistribution
from learner.nn.bptt import UPDATE_BIAS
from learner.nn.imagine import DynamicsWeights, Head, HeadWeights

HEADS = ("reward", "cont", "critic", "actor", "slow")
"""Side by side, so that those a step reads are neighbours: no reward at the start, neither policy nor slow
value at the end. Critic and actor, which have a backward pass, are neighbours, too."""
FIRST = ("prior", *HEADS, "deter", "stoch", "action")
"""First layers side by side. Up to deter all read the deterministic state; heads read stoch besides."""


class Map(NamedTuple):
    """An affine map as products read it."""

    weight: Tensor  # [I, O]
    bias: Tensor  # [O]


def affine(x: Tensor, by: Map, out: Tensor) -> None:
    """Fill out [n, O] from x [n, I]."""
    torch.addmm(by.bias, x, by.weight, out=out)


class Plan(NamedTuple):
    """Weights as the chunks read them."""

    policy: ActionDistribution
    pairs: Tensor  # [P / 2], 0 and the positive bins
    eps: Tensor  # [], added to mean squares
    columns: dict[str, slice]  # of the FIRST layers side by side
    scale: Tensor  # [sum of U], norm scales of the FIRST layers
    by_deter: Map  # [D, prior to deter]
    by_stoch: Tensor  # [Z, heads]
    embed_stoch: Map
    embed_action: Map
    deeper: tuple[dict[str, Map], ...]  # later layers by head
    deeper_scales: tuple[Tensor, ...]  # [l*U]
    outputs: dict[str, Map]  # of each head; two-hot outputs paired
    shared: Map  # [3U, D]
    own: Tensor  # [G, d, d]
    hidden_scale: Tensor  # [D]
    gates: tuple[Tensor, ...]  # [G, d, d] each: reset, update, candidate
    gates_bias: tuple[Tensor, ...]  # [G, 1, d] each; that of the update gate starts mostly closed
    prior: tuple[tuple[Map, Tensor], ...]  # later layers, and scales [U]
    prior_out: Map  # [U, Z]
    unimix: float


def paired(weight: Tensor, fill: float) -> Tensor:
    """Entries [K, ...] in the order of mirrored bins with one `fill` before the lower half: [P, ...].

    The halves, zero and upper against nothing and lower, then have the same size.
    """
    middle = weight.shape[0] // 2 + 1
    return torch.cat([weight[:middle], weight.new_full((1, *weight.shape[1:]), fill), weight[middle:]])


def unpaired(weight: Tensor) -> Tensor:
    """Inverse of `paired`."""
    middle = weight.shape[0] // 2
    return torch.cat([weight[:middle], weight[middle + 1 :]])


def _two_hot(head: Head) -> Map:
    return Map(paired(head.weight, 0.0).t(), paired(head.bias, -torch.inf))


def span(columns: dict[str, slice], names: Iterable[str]) -> slice:
    """Columns of neighbours."""
    parts = [columns[name] for name in names]
    return slice(parts[0].start, parts[-1].stop)


def make_plan(
    dynamics: DynamicsWeights, heads: HeadWeights, policy: ActionDistribution, bins: Tensor
) -> Plan:
    """The plan of present weights; bins [K] as from `mirrored_bins`."""
    core, action, size = dynamics.core, dynamics.action, dynamics.core.scale.shape[0]
    prior, firsts = dynamics.prior.layers, [getattr(heads, name).layers[0] for name in HEADS]
    scales = [prior[0].scale, *(layer.scale for layer in firsts), *core.in_scale, action.scale]
    columns, start = {}, 0
    for name, scale in zip(FIRST, scales, strict=True):
        columns[name] = slice(start, start + scale.shape[0])
        start += scale.shape[0]
    weights = [prior[0].weight, *(layer.weight[:, :size] for layer in firsts), core.deter_in]
    biases = [prior[0].bias, *(layer.bias for layer in firsts), core.deter_bias]
    deeper = [
        {name: layers[level] for name in HEADS if len(layers := getattr(heads, name).layers) > level}
        for level in range(1, max(len(head.layers) for head in heads))
    ]
    reset, candidate, update = core.gates.chunk(3, -1)
    reset_bias, candidate_bias, update_bias = core.gates_bias.chunk(3, -1)
    return Plan(
        policy=policy,
        pairs=torch.cat([bins.new_zeros(1), bins[1 : bins.shape[0] // 2 + 1]]),
        eps=core.scale.new_full((), 1e-4),
        columns=columns,
        scale=torch.cat(scales),
        by_deter=Map(torch.cat(weights).t(), torch.cat(biases)),
        by_stoch=torch.cat([layer.weight[:, size:] for layer in firsts]).t(),
        embed_stoch=Map(core.stoch_in.t(), core.stoch_bias),
        embed_action=Map(action.weight.t(), action.bias),
        deeper=tuple({name: Map(layer.weight.t(), layer.bias) for name, layer in x.items()} for x in deeper),
        deeper_scales=tuple(torch.cat([layer.scale for layer in x.values()]) for x in deeper),
        outputs={name: _two_hot(getattr(heads, name)) for name in ("reward", "critic", "slow")}
        | {name: Map((head := getattr(heads, name)).weight.t(), head.bias) for name in ("cont", "actor")},
        shared=Map(torch.cat([core.shared, dynamics.driver.t()]), dynamics.bias),
        own=core.own,
        hidden_scale=core.scale,
        gates=tuple(part.contiguous() for part in (reset, update, candidate)),
        gates_bias=(reset_bias, update_bias + UPDATE_BIAS, candidate_bias),
        prior=tuple((Map(layer.weight.t(), layer.bias), layer.scale) for layer in prior[1:]),
        prior_out=Map(dynamics.prior.weight.t(), dynamics.prior.bias),
        unimix=dynamics.unimix,
    )


def width_of(columns: slice) -> int:
    return columns.stop - columns.start
