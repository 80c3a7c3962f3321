"""Imagination in chunks of trajectories: a chunk rolls its whole horizon and reads all heads while in cache.

The same numbers as `reference_imagine`, and besides what the backward pass of `actor_critic` wants. Fewer
passes over memory: one product for the first layers of all heads, one norm for layers that lie side by side,
results written where they are kept, nothing evaluated that no loss reads.

Letters: see `learner.nn.imagine`; besides n trajectories of one chunk, L heads that have a layer, P = K + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.action_distribution import ActionDistribution
from learner.nn.bptt import UPDATE_BIAS
from learner.nn.imagine import DynamicsWeights, Head, HeadWeights, Imagined, Starts
from learner.nn.lanes import cut, run_lanes

CHUNK = 256
"""Trajectories of one chunk on a CPU."""
ORDER = ("reward", "cont", "critic", "actor", "slow")
"""Heads side by side, so that those a step reads are neighbours: no reward at the start, neither policy nor
slow value at the end. Critic and actor, which have a backward pass, are neighbours, too."""


class LayerTrace(NamedTuple):
    """One hidden layer of the L heads that have it."""

    heads: tuple[str, ...]
    unit: Tensor  # [H + 1, N, L, U], divided by the root mean square
    inverse: Tensor  # [H + 1, N, L, 1], one over the root mean square
    active: Tensor  # [H + 1, N, L, U], output


class Traces(NamedTuple):
    """What is kept for the backward pass, and space to be used again. Entries no loss reads mean nothing."""

    layers: tuple[LayerTrace, ...]
    logits: Tensor  # [H + 1, N, P], of the critic, paired
    probs: Tensor  # [H + 1, N, P], of the critic, paired
    chunks: tuple[_Chunk, ...]


class Map(NamedTuple):
    """An affine map as products read it."""

    weight: Tensor  # [I, O]
    bias: Tensor  # [O]


def affine(x: Tensor, by: Map, out: Tensor) -> None:
    """Fill out [n, O] from x [n, I]."""
    torch.addmm(by.bias, x, by.weight, out=out)


class _Plan(NamedTuple):
    """Weights as the chunks read them."""

    policy: ActionDistribution
    pairs: Tensor  # [P / 2], 0 and the positive bins
    eps: Tensor  # [], added to mean squares
    layers: tuple[tuple[Map, ...], ...]  # of each layer: the first of all heads together, then head by head
    scales: tuple[Tensor, ...]  # [L, U] of each layer
    outputs: dict[str, Map]  # of each head; two-hot outputs paired
    embed: tuple[Map, Map, Map]  # deter, stoch, action
    embed_scale: Tensor  # [3, U]
    shared: Map  # [3U, D]
    own: Tensor  # [G, d, d]
    scale: Tensor  # [D]
    gates: tuple[Tensor, ...]  # [G, d, d] each: reset, update, candidate
    gates_bias: tuple[Tensor, ...]  # [G, 1, d] each; that of the update gate starts mostly closed
    prior: tuple[tuple[Map, Tensor], ...]  # layers, and scales [U]
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


def _having(heads: HeadWeights, level: int) -> tuple[str, ...]:
    return tuple(name for name in ORDER if len(getattr(heads, name).layers) > level)


def _two_hot(head: Head) -> Map:
    return Map(paired(head.weight, 0.0).t(), paired(head.bias, -torch.inf))


def _plan(dynamics: DynamicsWeights, heads: HeadWeights, policy: ActionDistribution, bins: Tensor) -> _Plan:
    core, action = dynamics.core, dynamics.action
    layers, scales = [], []
    for level in range(max(len(head.layers) for head in heads)):
        parts = [getattr(heads, name).layers[level] for name in _having(heads, level)]
        scales.append(torch.stack([part.scale for part in parts]))
        if level == 0:
            weight = torch.cat([part.weight for part in parts])  # [L*U, F]
            layers.append((Map(weight.t(), torch.cat([part.bias for part in parts])),))
        else:
            layers.append(tuple(Map(part.weight.t(), part.bias) for part in parts))
    reset, candidate, update = core.gates.chunk(3, -1)
    reset_bias, candidate_bias, update_bias = core.gates_bias.chunk(3, -1)
    return _Plan(
        policy=policy,
        pairs=torch.cat([bins.new_zeros(1), bins[1 : bins.shape[0] // 2 + 1]]),
        eps=core.scale.new_full((), 1e-4),
        layers=tuple(layers),
        scales=tuple(scales),
        outputs={name: _two_hot(getattr(heads, name)) for name in ("reward", "critic", "slow")}
        | {
            name: Map(getattr(heads, name).weight.t(), getattr(heads, name).bias)
            for name in ("cont", "actor")
        },
        embed=(
            Map(core.deter_in.t(), core.deter_bias),
            Map(core.stoch_in.t(), core.stoch_bias),
            Map(action.weight.t(), action.bias),
        ),
        embed_scale=torch.cat([core.in_scale, action.scale.unsqueeze(0)]),
        shared=Map(torch.cat([core.shared, dynamics.driver.t()]), dynamics.bias),
        own=core.own,
        scale=core.scale,
        gates=tuple(part.contiguous() for part in (reset, update, candidate)),
        gates_bias=(reset_bias, update_bias + UPDATE_BIAS, candidate_bias),
        prior=tuple((Map(part.weight.t(), part.bias), part.scale) for part in dynamics.prior.layers),
        prior_out=Map(dynamics.prior.weight.t(), dynamics.prior.bias),
        unimix=dynamics.unimix,
    )


def _allocate(starts: Starts, plan: _Plan, parts: list[slice], heads: HeadWeights) -> tuple[Imagined, Traces]:
    count, horizon = starts.action_noise.shape[:2]
    new = starts.deter.new_empty
    feat = starts.deter.shape[1] + starts.stoch[0].numel()
    imagined = Imagined(
        feat=new(horizon + 1, count, feat),
        action=new(horizon, count, plan.embed[2].weight.shape[0]),
        raw=new(horizon, count, plan.outputs["actor"].bias.shape[0]),
        reward=new(horizon, count),
        cont=new(horizon + 1, count),
        value=new(horizon + 1, count),
        slow=new(horizon, count),
    )
    layers = []
    for level, scale in enumerate(plan.scales):
        shape = (horizon + 1, count, *scale.shape)  # [H + 1, N, L, U]
        layers.append(LayerTrace(_having(heads, level), new(shape), new(*shape[:-1], 1), new(shape)))
    logits, probs = (new(horizon + 1, count, 2 * plan.pairs.shape[0]) for _ in range(2))
    traces = Traces(tuple(layers), logits, probs, ())
    chunks = tuple(_Chunk(rows, starts, plan, imagined, traces) for rows in parts)
    return imagined, traces._replace(chunks=chunks)


def norm_silu(a: Tensor, scale: Tensor, eps: Tensor, inverse: Tensor, active: Tensor) -> None:
    """Layer's output from a [..., U], which becomes a / rms(a); inverse [..., 1] becomes 1 / rms(a)."""
    torch.linalg.vector_norm(a, dim=-1, keepdim=True, out=inverse)
    torch.addcmul(eps, inverse, inverse, value=1.0 / a.shape[-1], out=inverse)
    inverse.rsqrt_()
    a.mul_(inverse)
    torch.mul(a, scale, out=active)
    F.silu(active, inplace=True)


class _Read(NamedTuple):
    """Where the heads of one step write one layer."""

    part: slice  # of the heads that have the layer
    columns: slice  # the same as columns of the first layer's product
    heads: tuple[str, ...]
    unit: Tensor  # [n, l, U]
    inverse: Tensor  # [n, l, 1]
    active: Tensor  # [n, l, U]
    flat: Tensor  # [n, l*U], unit
    units: tuple[Tensor, ...]  # [n, U], unit by head
    below: dict[str, Tensor]  # [n, U], outputs of the layer before by head


class _Step(NamedTuple):
    """Where one step of one chunk writes; views made once."""

    feat: Tensor  # [n, F]
    deter: Tensor  # [n, D]
    blocked: Tensor  # [G, n, d], deter
    stoch: Tensor  # [n, Z]
    sample: Tensor  # [n, C, S], stoch
    reads: tuple[_Read, ...]
    last: dict[str, Tensor]  # [n, U], outputs of the last layer by head
    cont: Tensor  # [n]
    value: Tensor  # [n]
    logits: Tensor  # [n, P]
    probs: Tensor  # [n, P]


class _Chunk:
    """The rows of one chunk: views of what it fills, and space that its steps use again and again."""

    def __init__(self, rows: slice, starts: Starts, plan: _Plan, imagined: Imagined, traces: Traces) -> None:
        self.rows, self.horizon = rows, starts.action_noise.shape[1]
        count, (blocks, size) = rows.stop - rows.start, plan.own.shape[:2]
        deter, units = blocks * size, plan.embed_scale.shape[1]
        self.classes, self.variables = starts.stoch.shape[1:]
        new = starts.deter.new_empty
        self.embedded, self.inputs, self.inverse = (
            new(count, 3, units),
            new(count, 3, units),
            new(count, 3, 1),
        )
        self.hidden, self.active = new(count, deter), new(count, deter)
        self.own, self.gates = new(blocks, count, size), new(3, blocks, count, size)
        self.prior = [(new(count, scale.shape[0]), new(count, scale.shape[0])) for _, scale in plan.prior]
        # Whether the cumulative distribution is still below the uniform, class by class: 1 before the first
        # class and 0 behind the last, so that its steps are the sample.
        self.below = new(count, self.classes + 1, self.variables).fill_(1.0)
        self.below[:, -1] = 0.0
        self.logits, self.probs = (new(count, 2 * plan.pairs.shape[0]) for _ in range(2))
        self.reward, self.slow = imagined.reward[:, rows].unbind(), imagined.slow[:, rows].unbind()
        self.raw, self.action = imagined.raw[:, rows].unbind(), imagined.action[:, rows].unbind()
        self.steps = [self._step(h, blocks, imagined, traces) for h in range(self.horizon + 1)]

    def _step(self, h: int, blocks: int, imagined: Imagined, traces: Traces) -> _Step:
        wanted = ORDER[1:] if h == 0 else ORDER[:3] if h == self.horizon else ORDER
        reads, last = [], {}
        for trace in traces.layers:
            names = tuple(name for name in trace.heads if name in wanted)
            if not names:
                break
            first, units = trace.heads.index(names[0]), trace.unit.shape[-1]
            part = slice(first, first + len(names))
            columns = slice(first * units, (first + len(names)) * units)
            unit, inverse, active = (x[h, self.rows, part] for x in trace[1:])
            reads.append(
                _Read(
                    part, columns, names, unit, inverse, active, unit.flatten(1), unit.unbind(1), dict(last)
                )
            )
            last |= dict(zip(names, active.unbind(1), strict=True))
        feat = imagined.feat[h, self.rows]
        deter, stoch = feat.tensor_split([self.hidden.shape[1]], 1)
        return _Step(
            feat=feat,
            deter=deter,
            blocked=deter.unflatten(1, (blocks, -1)).transpose(0, 1),
            stoch=stoch,
            sample=stoch.unflatten(1, (self.classes, -1)),
            reads=tuple(reads),
            last=last,
            cont=imagined.cont[h, self.rows].unsqueeze(1),
            value=imagined.value[h, self.rows],
            logits=traces.logits[h, self.rows],
            probs=traces.probs[h, self.rows],
        )

    def roll(self, starts: Starts, plan: _Plan) -> None:
        """All steps."""
        action_noise = starts.action_noise[self.rows].unbind(1)
        stoch_noise = starts.stoch_noise[self.rows].unsqueeze(1).unbind(2)  # [n, 1, S] each
        step = self.steps[0]
        step.deter.copy_(starts.deter[self.rows])
        step.sample.copy_(starts.stoch[self.rows])
        for h, after in enumerate(self.steps[1:]):
            self._read(h, step, plan)
            affine(step.last["actor"], plan.outputs["actor"], self.raw[h])
            self.raw[h].copy_(plan.policy.raw(self.raw[h]))
            self.action[h].copy_(plan.policy.sample(self.raw[h], action_noise[h]))
            self._scalar("slow", step, plan, self.logits, self.probs, self.slow[h])
            self._advance(self.action[h], step, after, plan)
            self._sample(after, stoch_noise[h], plan)
            step = after
        self._read(self.horizon, step, plan)

    def _read(self, h: int, step: _Step, plan: _Plan) -> None:
        """Hidden layers of all heads of step h, continuation, value and reward."""
        for level, read in enumerate(step.reads):
            maps = plan.layers[level]
            if level == 0:
                weight, bias = maps[0]
                affine(step.feat, Map(weight[:, read.columns], bias[read.columns]), read.flat)
            else:
                for by, name, unit in zip(maps[read.part], read.heads, read.units, strict=True):
                    affine(read.below[name], by, unit)
            norm_silu(read.unit, plan.scales[level][read.part], plan.eps, read.inverse, read.active)
        affine(step.last["cont"], plan.outputs["cont"], step.cont)
        step.cont.sigmoid_()
        self._scalar("critic", step, plan, step.logits, step.probs, step.value)
        if h > 0:
            self._scalar("reward", step, plan, self.logits, self.probs, self.reward[h - 1])

    def _scalar(
        self, name: str, step: _Step, plan: _Plan, logits: Tensor, probs: Tensor, out: Tensor
    ) -> None:
        """Fill out [n] with the mean of a two-hot head; mirrored bins are subtracted before the sum."""
        affine(step.last[name], plan.outputs[name], logits)
        torch.softmax(logits, -1, out=probs)
        upper, lower = probs.chunk(2, 1)
        torch.mv(upper - lower, plan.pairs, out=out)

    def _advance(self, action: Tensor, step: _Step, after: _Step, plan: _Plan) -> None:
        """The deterministic state that follows `step`."""
        clipped = action / action.abs().clamp_(min=1.0)
        reads = (step.deter, step.stoch, clipped)
        for x, by, out in zip(reads, plan.embed, self.embedded.unbind(1), strict=True):
            affine(x, by, out)
        norm_silu(self.embedded, plan.embed_scale, plan.eps, self.inverse, self.inputs)
        affine(self.inputs.flatten(1), plan.shared, self.hidden)
        torch.bmm(step.blocked, plan.own, out=self.own)
        self.hidden.view(-1, *self.own.shape[::2]).add_(self.own.transpose(0, 1))
        norm_silu(self.hidden, plan.scale, plan.eps, self.inverse[:, 0], self.active)
        active = self.active.unflatten(1, self.own.shape[::2]).transpose(0, 1)  # [G, n, d]
        for weight, bias, out in zip(plan.gates, plan.gates_bias, self.gates, strict=True):
            torch.baddbmm(bias, active, weight, out=out)
        self.gates[:2].sigmoid_()
        reset, update, candidate = self.gates
        candidate.mul_(reset).tanh_().sub_(step.blocked)
        torch.addcmul(step.blocked, candidate, update, out=after.blocked)

    def _sample(self, after: _Step, uniform: Tensor, plan: _Plan) -> None:
        """The stochastic state by uniforms [n, 1, S]; as `sample_one_hot` of `mixed_probs`."""
        x = after.deter
        for (by, scale), (unit, active) in zip(plan.prior, self.prior, strict=True):
            affine(x, by, unit)
            norm_silu(unit, scale, plan.eps, self.inverse[:, 0], active)
            x = active
        logits = torch.addmm(plan.prior_out.bias, x, plan.prior_out.weight)
        probs = torch.softmax(logits.view(-1, self.classes, self.variables), 1)
        if plan.unimix:
            probs.mul_(1.0 - plan.unimix).add_(plan.unimix / self.classes)
        torch.lt(probs[:, :-1].cumsum(1), uniform, out=self.below[:, 1:-1])
        torch.sub(self.below[:, :-1], self.below[:, 1:], out=after.sample)


@torch.no_grad()
def imagine(
    starts: Starts,
    dynamics: DynamicsWeights,
    heads: HeadWeights,
    policy: ActionDistribution,
    bins: Tensor,
    into: tuple[Imagined, Traces] | None = None,
) -> tuple[Imagined, Traces]:
    """Roll H steps from the starts and read all heads; bins [K] as from `mirrored_bins`. float32 only.

    `into`: what an earlier call with the same shapes returned, to be overwritten; memory that was used before
    costs less than new one.
    """
    plan = _plan(dynamics, heads, policy, bins)
    if into is None:
        count = starts.deter.shape[0]
        parts = [slice(0, count)] if starts.deter.is_cuda else cut(count, CHUNK, least=2)
        into = _allocate(starts, plan, parts, heads)
    run_lanes(lambda chunk: chunk.roll(starts, plan), into[1].chunks)
    return into
