"""Imagination in chunks of trajectories: a chunk rolls its whole horizon and reads all heads while in cache.

The same numbers as `reference_imagine`, and besides what the backward pass of `actor_critic` wants. Fewer
passes over memory: one product of deter for everything that reads it, and one of stoch, one norm for layers
that lie side by side, space that is used again and again, nothing evaluated that no loss reads.

Letters: see `learner.nn.imagine`; besides n trajectories of one chunk, l layers side by side, P = K + 1.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.action_distribution import ActionDistribution
from learner.nn.categorical import thresholds
from learner.nn.imagine import DynamicsWeights, HeadWeights, Imagined, Starts
from learner.nn.imagine_plan import FIRST, HEADS, Map, Plan, affine, make_plan, span, width_of
from learner.nn.lanes import cut, run_lanes

CHUNK = 512
"""Trajectories of one chunk on a CPU: fewer stay in cache, more ask the interpreter less often."""


class LayerTrace(NamedTuple):
    """One hidden layer of those of critic and actor, l of them, that have it."""

    heads: tuple[str, ...]
    unit: Tensor  # [H, N, l, U], divided by the root mean square
    inverse: Tensor  # [H, N, l, 1], one over the root mean square


class Traces(NamedTuple):
    """What is kept for the backward pass, and the space of the chunks."""

    layers: tuple[LayerTrace, ...]
    logits: Tensor  # [H, N, P], of the critic, paired
    chunks: tuple[_Chunk, ...]


class _Norm(NamedTuple):
    """RMS norm and SiLU of l layers side by side, in place: the less memory a step touches, the faster."""

    unit: Tensor  # [n, l, U]
    flat: Tensor  # [n, l*U], the same
    inverse: Tensor  # [n, l, 1], one over the root mean square

    @classmethod
    def of(cls, flat: Tensor, inverse: Tensor) -> _Norm:
        return cls(flat.unflatten(1, (inverse.shape[1], -1)), flat, inverse)

    def divide(self, eps: Tensor) -> None:
        """Divide by the root mean square."""
        inverse, unit = self.inverse, self.unit
        torch.linalg.vector_norm(unit, dim=-1, keepdim=True, out=inverse)
        torch.addcmul(eps, inverse, inverse, value=1.0 / unit.shape[-1], out=inverse)
        unit.mul_(inverse.rsqrt_())

    def activate(self, scale: Tensor) -> None:
        """Multiply by the scale [l*U], then SiLU."""
        F.silu(self.flat.mul_(scale), inplace=True)

    def apply(self, scale: Tensor, eps: Tensor) -> None:
        self.divide(eps)
        self.activate(scale)


class _Layer(NamedTuple):
    """A later layer of some heads, side by side."""

    names: tuple[str, ...]
    reads: tuple[Tensor, ...]  # [n, U] by head
    fills: tuple[Tensor, ...]  # [n, U] by head, before the norm
    columns: slice  # of the layer's scales
    norm: _Norm


class _Cut(NamedTuple):
    """The weights of one reader, cut out of a plan."""

    by_deter: Map
    by_stoch: Tensor
    scales: tuple[Tensor, ...]  # by norm of first layers
    deeper_scales: tuple[Tensor, ...]


class _Reader(NamedTuple):
    """What the start, a state on the way or the last one is read for, and the space for it."""

    by_deter: slice  # columns of `Plan.by_deter`
    from_deter: Tensor  # [n, *]
    by_stoch: slice  # columns of `Plan.by_stoch`
    from_stoch: Tensor  # [n, *]
    norms: tuple[tuple[slice, _Norm], ...]  # of first layers, and the columns of their scales
    deeper: tuple[_Layer, ...]
    last: dict[str, Tensor]  # [n, U] by head, outputs of its last layer

    def cut(self, plan: Plan) -> _Cut:
        weight, bias = plan.by_deter
        pairs = zip(plan.deeper_scales, self.deeper, strict=False)
        return _Cut(
            by_deter=Map(weight[:, self.by_deter], bias[self.by_deter]),
            by_stoch=plan.by_stoch[:, self.by_stoch],
            scales=tuple(plan.scale[columns] for columns, _ in self.norms),
            deeper_scales=tuple(scale[layer.columns] for scale, layer in pairs),
        )


class _Step(NamedTuple):
    """Where one state and what is read of it are kept."""

    kind: int  # 0 for the start, 2 for the end, 1 between
    reader: _Reader
    deter: Tensor  # [n, D]
    blocked: Tensor  # [G, n, d], deter
    stoch: Tensor  # [n, Z]
    sample: Tensor  # [n, C, S], stoch
    cont: Tensor  # [n, 1]
    logits: Tensor  # [n, P], of the critic
    value: Tensor  # [n]


class _Chunk:
    """The rows of one chunk: where they are kept, and space that its steps use again and again."""

    def __init__(self, rows: slice, starts: Starts, plan: Plan, imagined: Imagined, traces: Traces) -> None:
        self.rows = rows
        count, (blocks, size) = rows.stop - rows.start, plan.own.shape[:2]
        self.classes, self.variables = starts.stoch.shape[1:]
        new = starts.deter.new_empty
        self.first, self.inverse = new(count, plan.scale.shape[0]), new(count, len(FIRST))
        self.later = [
            (new(count, scale.shape[0]), new(count, len(maps)))
            for maps, scale in zip(plan.deeper, plan.deeper_scales, strict=True)
        ]
        (self.prior_norm,), (self.action_norm,) = (
            [norm for _, norm in self._norms(plan, (name,))] for name in ("prior", "action")
        )
        self.prior = [
            _Norm.of(new(count, width), new(count, 1, 1))
            for width in (scale.shape[0] for _, scale in plan.prior)
        ]
        self.inputs = self.first[:, span(plan.columns, ("deter", "stoch", "action"))]  # [n, 3U]
        self.hidden = _Norm.of(new(count, blocks * size), new(count, 1, 1))
        self.hidden_blocks = self.hidden.flat.unflatten(1, (blocks, size))  # [n, G, d]
        self.blocked_hidden = self.hidden_blocks.transpose(0, 1)  # [G, n, d]
        gates = new(3, blocks, count, size)
        self.gates, self.sigmoids = gates.unbind(), gates[:2]
        self.own = self.gates[0]  # is read before there are gates
        self.own_rows = self.own.transpose(0, 1)  # [n, G, d]
        # Whether the cumulative distribution is still below the uniform, class by class: 1 before the first
        # class and 0 behind the last, so that its steps are the sample.
        below = new(count, self.classes + 1, self.variables).fill_(1.0)
        below[:, -1] = 0.0
        self.below, self.behind, self.inner = below[:, :-1], below[:, 1:], below[:, 1:-1]
        self.prior_logits = new(count, self.classes * self.variables)
        self.prior_classes = self.prior_logits.unflatten(1, (self.classes, -1))  # [n, C, S]
        self.prior_probs = torch.empty_like(self.prior_classes)
        self.likely = self.prior_probs[:, :-1]
        self.logits, self.probs = (new(count, 2 * plan.pairs.shape[0]) for _ in range(2))
        self.halves = self.probs.chunk(2, 1)
        self.reward, self.slow = imagined.reward[:, rows].unbind(), imagined.slow[:, rows].unbind()
        self.raw, self.action = imagined.raw[:, rows].unbind(), imagined.action[:, rows].unbind()
        self.stoch = self.first[:, plan.columns["stoch"]]
        self.readers = (
            self._reader(plan, HEADS[1:], "start"),
            self._reader(plan, HEADS, "between"),
            self._reader(plan, HEADS[:3], "end"),
        )
        kinds = [0, *[1] * (imagined.action.shape[0] - 1), 2]
        self.steps = [self._step(h, kind, blocks, imagined, traces) for h, kind in enumerate(kinds)]
        self.kept = self._keep(plan, traces)

    def _norms(self, plan: Plan, names: tuple[str, ...]) -> list[tuple[slice, _Norm]]:
        """Norms of neighbouring first layers, as many at once as have the same width."""
        out = []
        for width, same in groupby(names, lambda name: width_of(plan.columns[name])):
            run = list(same)
            columns, first = span(plan.columns, run), FIRST.index(run[0])
            inverse = self.inverse[:, first : first + len(run)].unsqueeze(-1)  # [n, l, 1]
            assert width * len(run) == width_of(columns), (width, run)
            out.append((columns, _Norm.of(self.first[:, columns], inverse)))
        return out

    def _reader(self, plan: Plan, heads: tuple[str, ...], where: str) -> _Reader:
        onward = () if where == "end" else ("deter",)
        by_deter = span(plan.columns, (() if where == "start" else ("prior",)) + heads + onward)
        by_stoch, offset = span(plan.columns, heads), plan.columns[HEADS[0]].start
        last = {name: self.first[:, plan.columns[name]] for name in heads}
        deeper = []
        for maps, (flat, inverse) in zip(plan.deeper, self.later, strict=True):
            names = tuple(name for name in maps if name in heads)
            if not names:
                break
            first, units = list(maps).index(names[0]), flat.shape[1] // len(maps)
            layers, columns = (
                slice(first, first + len(names)),
                slice(first * units, (first + len(names)) * units),
            )
            norm = _Norm.of(flat[:, columns], inverse[:, layers].unsqueeze(-1))
            reads, fills = tuple(last[name] for name in names), norm.unit.unbind(1)
            deeper.append(_Layer(names, reads, fills, columns, norm))
            last |= dict(zip(names, fills, strict=True))
        return _Reader(
            by_deter=by_deter,
            from_deter=self.first[:, by_deter],
            by_stoch=slice(by_stoch.start - offset, by_stoch.stop - offset),
            from_stoch=self.first[:, by_stoch],
            norms=tuple(self._norms(plan, heads + (onward and ("deter", "stoch")))),
            deeper=tuple(deeper),
            last=last,
        )

    def _step(self, h: int, kind: int, blocks: int, imagined: Imagined, traces: Traces) -> _Step:
        deter, stoch = imagined.feat[h, self.rows].tensor_split([self.hidden.flat.shape[1]], 1)
        return _Step(
            kind=kind,
            reader=self.readers[kind],
            deter=deter,
            blocked=deter.unflatten(1, (blocks, -1)).transpose(0, 1),
            stoch=stoch,
            sample=stoch.unflatten(1, (self.classes, -1)),
            cont=imagined.cont[h, self.rows].unsqueeze(1),
            logits=traces.logits[h, self.rows] if h < traces.logits.shape[0] else self.logits,
            value=imagined.value[h, self.rows],
        )

    def _keep(self, plan: Plan, traces: Traces) -> list[list[tuple[Tensor, tuple[Tensor, ...]]]]:
        """What of each level is copied into the traces at every step but the last, and where to."""
        out = []
        spaces = [
            (self.first, self.inverse, FIRST),
            *((*x, tuple(m)) for x, m in zip(self.later, plan.deeper, strict=True)),
        ]
        for trace, (flat, inverse, order) in zip(traces.layers, spaces, strict=False):
            layers = slice(order.index(trace.heads[0]), order.index(trace.heads[-1]) + 1)
            if order is FIRST:
                unit = flat[:, span(plan.columns, trace.heads)]
            else:
                units = flat.shape[1] // len(order)
                unit = flat[:, layers.start * units : layers.stop * units]
            unit = unit.unflatten(1, trace.unit.shape[2:])
            inverse = inverse[:, layers].unsqueeze(-1)
            targets = (x[:, self.rows].unbind() for x in (trace.unit, trace.inverse))
            out.append(list(zip((unit, inverse), targets, strict=True)))
        return out

    def roll(self, starts: Starts, plan: Plan) -> None:
        """All steps."""
        action_noise = starts.action_noise[self.rows].transpose(0, 1).contiguous()  # [H, n, W]
        stoch_noise = starts.stoch_noise[self.rows].transpose(0, 1)  # [H, n, S]
        limits = thresholds(stoch_noise, self.classes, plan.unimix).unbind()  # each [n, C - 1, S]
        cuts = [reader.cut(plan) for reader in self.readers]
        action_scale, prior_scale = (plan.scale[plan.columns[name]] for name in ("action", "prior"))
        step = self.steps[0]
        step.deter.copy_(starts.deter[self.rows])
        step.sample.copy_(starts.stoch[self.rows])
        affine(step.deter, cuts[0].by_deter, step.reader.from_deter)
        for h, after in enumerate(self.steps[1:]):
            self._read(h, step, cuts[step.kind], plan)
            if h > 0:
                self._scalar("reward", step, plan, self.logits, self.reward[h - 1])
            self._scalar("slow", step, plan, self.logits, self.slow[h])
            affine(step.reader.last["actor"], plan.outputs["actor"], self.raw[h])
            self.raw[h].copy_(plan.policy.raw(self.raw[h]))
            self.action[h].copy_(plan.policy.sample(self.raw[h], action_noise[h]))
            self._advance(self.action[h], action_scale, step, after, plan)
            affine(after.deter, cuts[after.kind].by_deter, after.reader.from_deter)
            self._sample(limits[h], prior_scale, after, plan)
            step = after
        self._read(len(self.raw), step, cuts[step.kind], plan)
        self._scalar("reward", step, plan, self.logits, self.reward[-1])

    def _read(self, h: int, step: _Step, cut: _Cut, plan: Plan) -> None:
        """Hidden layers of heads and core, continuation and value of state h; its part by deter is there."""
        reader = step.reader
        torch.addmm(reader.from_stoch, step.stoch, cut.by_stoch, out=reader.from_stoch)
        if step.kind < 2:  # there is a next state
            affine(step.stoch, plan.embed_stoch, self.stoch)
        for _, norm in reader.norms:
            norm.divide(plan.eps)
        self._copy(0, h)
        for (_, norm), scale in zip(reader.norms, cut.scales, strict=True):
            norm.activate(scale)
        levels = zip(reader.deeper, plan.deeper, cut.deeper_scales, strict=False)
        for level, (layer, maps, scale) in enumerate(levels, 1):
            for name, x, out in zip(layer.names, layer.reads, layer.fills, strict=True):
                affine(x, maps[name], out)
            layer.norm.divide(plan.eps)
            self._copy(level, h)
            layer.norm.activate(scale)
        affine(reader.last["cont"], plan.outputs["cont"], step.cont)
        step.cont.sigmoid_()
        self._scalar("critic", step, plan, step.logits, step.value)

    def _copy(self, level: int, h: int) -> None:
        """Keep what the backward pass wants of a level's layers before they are activated."""
        if level < len(self.kept) and h < len(self.raw):
            for source, targets in self.kept[level]:
                targets[h].copy_(source)

    def _scalar(self, name: str, step: _Step, plan: Plan, logits: Tensor, out: Tensor) -> None:
        """Fill out [n] with the mean of a two-hot head; mirrored bins are subtracted before the sum."""
        affine(step.reader.last[name], plan.outputs[name], logits)
        torch.softmax(logits, -1, out=self.probs)
        upper, lower = self.halves
        torch.mv(upper.sub_(lower), plan.pairs, out=out)

    def _advance(self, action: Tensor, scale: Tensor, step: _Step, after: _Step, plan: Plan) -> None:
        """The deterministic state that follows `step`; deter and stoch are embedded already."""
        clipped = action / action.abs().clamp_(min=1.0)
        affine(clipped, plan.embed_action, self.action_norm.flat)
        self.action_norm.apply(scale, plan.eps)
        affine(self.inputs, plan.shared, self.hidden.flat)
        torch.bmm(step.blocked, plan.own, out=self.own)
        self.hidden_blocks.add_(self.own_rows)
        self.hidden.apply(plan.hidden_scale, plan.eps)
        for weight, bias, out in zip(plan.gates, plan.gates_bias, self.gates, strict=True):
            torch.baddbmm(bias, self.blocked_hidden, weight, out=out)
        self.sigmoids.sigmoid_()
        reset, update, candidate = self.gates
        torch.lerp(step.blocked, candidate.mul_(reset).tanh_(), update, out=after.blocked)

    def _sample(self, threshold: Tensor, scale: Tensor, after: _Step, plan: Plan) -> None:
        """The stochastic state by `thresholds` [n, C - 1, S]; as `sample_one_hot` of `mixed_probs`."""
        self.prior_norm.apply(scale, plan.eps)
        x = self.prior_norm.flat
        for (by, later_scale), norm in zip(plan.prior, self.prior, strict=True):
            affine(x, by, norm.flat)
            norm.apply(later_scale, plan.eps)
            x = norm.flat
        affine(x, plan.prior_out, self.prior_logits)
        torch.softmax(self.prior_classes, 1, out=self.prior_probs)
        torch.lt(self.likely.cumsum(1), threshold, out=self.inner)
        torch.sub(self.below, self.behind, out=after.sample)


def _allocate(starts: Starts, plan: Plan, heads: HeadWeights, parts: list[slice]) -> tuple[Imagined, Traces]:
    count, horizon = starts.action_noise.shape[:2]
    new = starts.deter.new_empty
    feat = starts.deter.shape[1] + starts.stoch[0].numel()
    imagined = Imagined(
        feat=new(horizon + 1, count, feat),
        action=new(horizon, count, plan.embed_action.weight.shape[0]),
        raw=new(horizon, count, plan.outputs["actor"].bias.shape[0]),
        reward=new(horizon, count),
        cont=new(horizon + 1, count),
        value=new(horizon + 1, count),
        slow=new(horizon, count),
    )
    layers, units = [], width_of(plan.columns["critic"])
    for level in range(max(len(heads.critic.layers), len(heads.actor.layers))):
        names = tuple(name for name in ("critic", "actor") if len(getattr(heads, name).layers) > level)
        shape = (horizon, count, len(names))
        layers.append(LayerTrace(names, new(*shape, units), new(*shape, 1)))
    traces = Traces(tuple(layers), new(horizon, count, 2 * plan.pairs.shape[0]), ())
    chunks = tuple(_Chunk(rows, starts, plan, imagined, traces) for rows in parts)
    return imagined, traces._replace(chunks=chunks)


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
    plan = make_plan(dynamics, heads, policy, bins)
    if into is None:
        count = starts.deter.shape[0]
        parts = [slice(0, count)] if starts.deter.is_cuda else cut(count, CHUNK, least=2)
        into = _allocate(starts, plan, heads, parts)
    run_lanes(lambda chunk: chunk.roll(starts, plan), into[1].chunks)
    return into
