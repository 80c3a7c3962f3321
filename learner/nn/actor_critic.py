"""Losses of actor and critic over imagined and replayed rows, with their gradients written out.

Nothing here is differentiated by autograd: the inputs are constants, so the gradient by the critic's logits
is weight * (sum of targets * probs - targets), that by the policy's outputs a score, and a weight gradient a
product over rows that `imagine` has left activations of. Only replayed rows pass a gradient on, into their
features. `reference_actor_critic` is the same under autograd and the oracle of its tests.

Letters: see `learner.nn.imagine`; besides r rows of one block, P = K + 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.action_distribution import ActionDistribution
from learner.nn.imagine import Head, HeadWeights, Imagined, Layer, outputs
from learner.nn.imagine_plan import paired, unpaired
from learner.nn.imagine_rows import LayerTrace, Traces
from learner.nn.lanes import run_lanes
from learner.nn.twohot import TwoHot, twohot

BLOCK = 2048
"""Rows whose gradients are computed together on a CPU: fewer would ask the interpreter more often."""
LANES = 4
"""Sums over rows are added up in this many parts, whatever the number of threads."""


class Targets(NamedTuple):
    """What the losses compare with; constants. Weights include every factor but those of the three losses."""

    returns: Tensor  # [H, N]
    advantage: Tensor  # [H, N], divided by the return scale
    weight: Tensor  # [H, N], of imagined rows
    replay_returns: Tensor  # [N], of the starts as replayed rows
    replay_weight: Tensor  # [N]


class Factors(NamedTuple):
    """Factors on the losses."""

    policy: float
    value: float
    replay_value: float
    entropy: float  # of the policy, inside the policy loss
    slow: float  # of the target by the slow critic, inside both value losses


class Losses(NamedTuple):
    """Sums over rows of weight times loss, each []."""

    policy: Tensor
    value: Tensor
    replay_value: Tensor
    entropy: Tensor  # of the policy, sum over rows without weight: a metric


def reference_actor_critic(
    feat: Tensor,
    imagined: Imagined,
    targets: Targets,
    heads: HeadWeights,
    policy: ActionDistribution,
    bins: Tensor,
    factors: Factors,
) -> Losses:
    """The losses of `actor_critic` for autograd; feat [N, F] are the features of the replayed rows."""
    raw = policy.raw(outputs(imagined.feat[:-1], heads.actor))  # [H, N, R]
    entropy = policy.entropy(raw)
    gain = policy.log_prob(raw, imagined.action) * targets.advantage + factors.entropy * entropy
    scales = (1.0, factors.slow)
    critic = TwoHot.of(outputs(imagined.feat[:-1], heads.critic), bins)
    replay = TwoHot.of(outputs(feat, heads.critic), bins)
    replay_loss = replay.loss(targets.replay_returns, imagined.slow[0], scales=scales)
    return Losses(
        policy=-(targets.weight * gain).sum(),
        value=(targets.weight * critic.loss(targets.returns, imagined.slow, scales=scales)).sum(),
        replay_value=(targets.replay_weight * replay_loss).sum(),
        entropy=entropy.detach().sum(),
    )


def actor_critic(
    feat: Tensor,
    imagined: Imagined,
    traces: Traces,
    targets: Targets,
    heads: HeadWeights,
    policy: ActionDistribution,
    bins: Tensor,
    factors: Factors,
) -> tuple[Tensor, Losses]:
    """(sum of factor times loss, [], differentiable by feat and the weights of actor and critic; the losses).

    feat [N, F] are the features of the replayed rows, equal to imagined.feat[0]; `traces`: from `imagine`.
    """
    weights = [*flatten(heads.critic), *flatten(heads.actor)]
    given = (imagined, traces, targets, policy, bins, factors)
    total, *losses = _ActorCritic.apply(feat, given, len(heads.critic.layers), *weights)  # type: ignore[misc]
    return total, Losses(*losses)


class _ActorCritic(torch.autograd.Function):
    """The forward pass already has the gradients: the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, given: tuple[Any, ...], depth: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        imagined, traces, targets, policy, bins, factors = given
        cut_at = 3 * depth + 2
        nets = _Nets(unflatten(weights[:cut_at]), unflatten(weights[cut_at:]))
        rows = _Rows.of(imagined, traces, targets, bins, factors)
        by_feat = torch.empty_like(feat)
        single = feat.is_cuda
        lanes = 1 if single else LANES
        block = rows.weight.shape[0] if single else BLOCK
        parts = [slice(i, i + 1) for i in range(lanes)]

        def lane(part: slice) -> _Lane:
            work = _Lane(rows, nets, policy, factors, by_feat)
            work.run(part.start, lanes, block)
            return work

        done = run_lanes(lane, parts)
        sums = [torch.stack(parts).sum(0) for parts in zip(*(work.sums() for work in done), strict=True)]
        policy_loss, value, replay, entropy = sums[0].unbind()
        ctx.grads = (by_feat, *sums[1:])
        total = factors.policy * policy_loss + factors.value * value + factors.replay_value * replay
        losses = (policy_loss, value, replay, entropy)
        ctx.mark_non_differentiable(*losses)
        return total, *losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        by_feat, *by_weights = (part * grads[0] for part in ctx.grads)
        return by_feat, None, None, *by_weights


class _Nets(NamedTuple):
    critic: Head
    actor: Head


class _Rows(NamedTuple):
    """Everything by row: H*N imagined ones in the order of [H, N]; N replayed rows are like step 0."""

    feat: Tensor  # [H*N, F]
    action: Tensor  # [H*N, A]
    raw: Tensor  # [H*N, R]
    layers: tuple[LayerTrace, ...]  # unit [H*N, l, U], inverse [H*N, l, 1]
    logits: Tensor  # [H*N, P]
    advantage: Tensor  # [H*N]
    weight: Tensor  # [H*N]
    bin: Tensor  # [H*N, 4], of the targets
    share: Tensor  # [H*N, 4], of the targets: weight and scale included
    replay_bin: Tensor  # [N, 4]
    replay_share: Tensor  # [N, 4]

    @classmethod
    def of(
        cls, imagined: Imagined, traces: Traces, targets: Targets, bins: Tensor, factors: Factors
    ) -> _Rows:
        steps = targets.weight.shape[0]

        def flat(x: Tensor) -> Tensor:  # [H or H + 1, N, ...] -> [H*N, ...]
            return x[:steps].reshape(-1, *x.shape[2:])

        def coded(returns: Tensor, slow: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            index, share = twohot(torch.stack([returns, slow], -1), bins)  # [r, 2, 2]
            share = share * torch.stack([weight, weight * factors.slow], -1).unsqueeze(-1)
            index = index + (index > bins.shape[0] // 2)  # where `paired` has moved them
            return index.flatten(1), share.flatten(1)

        index, share = coded(flat(targets.returns), flat(imagined.slow), flat(targets.weight))
        replay = coded(targets.replay_returns, imagined.slow[0], targets.replay_weight)
        return cls(
            flat(imagined.feat),
            flat(imagined.action),
            flat(imagined.raw),
            tuple(LayerTrace(heads, flat(unit), flat(inverse)) for heads, unit, inverse in traces.layers),
            flat(traces.logits),
            flat(targets.advantage),
            flat(targets.weight),
            index,
            share,
            *replay,
        )


class _Lane:
    """Adds up losses and weight gradients over some rows."""

    def __init__(
        self, rows: _Rows, nets: _Nets, policy: ActionDistribution, factors: Factors, by_feat: Tensor
    ) -> None:
        self.rows, self.nets, self.policy, self.factors, self.by_feat = rows, nets, policy, factors, by_feat
        zeros = torch.zeros_like
        self.critic_out = paired(nets.critic.weight, 0.0)  # [P, U]
        self.losses = rows.weight.new_zeros(4)  # policy, value, replay, entropy
        self.grads = {
            name: Head(
                tuple(Layer(*map(zeros, layer)) for layer in net.layers), zeros(net.weight), zeros(net.bias)
            )
            for name, net in nets._asdict().items()
        }
        grads = self.grads["critic"]
        self.grads["critic"] = grads._replace(weight=paired(grads.weight, 0.0), bias=paired(grads.bias, 0.0))
        units, width = nets.actor.layers[0].bias.shape[0], rows.feat.shape[1]
        self.by_first = rows.feat.new_zeros(2 * units, width)  # [2U, F]
        self.scales = [  # [l, U] of each layer
            torch.stack([getattr(nets, name).layers[level].scale for name in trace.heads])
            for level, trace in enumerate(rows.layers)
        ]
        self.by_scales = [zeros(scale) for scale in self.scales]

    def run(self, lane: int, lanes: int, block: int) -> None:
        """This lane's share of imagined, then of replayed rows."""
        total, starts = self.rows.weight.shape[0], self.rows.replay_share.shape[0]
        first, last = total * lane // lanes, total * (lane + 1) // lanes
        by_outputs = self._actor(slice(first, last))  # small beside the rest: all at once
        for start in range(first, last, block):
            part = slice(start, min(last, start + block))
            by_actor = by_outputs[start - first : part.stop - first]
            self._layers(part, {"critic": self._critic(part, replay=False), "actor": by_actor}, None)
        part = slice(starts * lane // lanes, starts * (lane + 1) // lanes)
        if part.stop > part.start:
            self._layers(part, {"critic": self._critic(part, replay=True)}, self.by_feat[part])

    def sums(self) -> tuple[Tensor, ...]:
        """Losses [4], then the gradients in the order of critic's and actor's weights."""
        units = self.by_first.shape[0] // 2
        for index, name in enumerate(_Nets._fields):
            self.grads[name].layers[0].weight.copy_(self.by_first[index * units : (index + 1) * units])
        for level, trace in enumerate(self.rows.layers):
            for name, by_scale in zip(trace.heads, self.by_scales[level], strict=True):
                self.grads[name].layers[level].scale.copy_(by_scale)
        critic = self.grads["critic"]
        critic = critic._replace(weight=unpaired(critic.weight), bias=unpaired(critic.bias))
        return self.losses, *flatten(critic), *flatten(self.grads["actor"])

    def _critic(self, part: slice, *, replay: bool) -> Tensor:
        """Gradient by the paired logits [r, P]; adds the loss."""
        rows = self.rows
        index = (rows.replay_bin if replay else rows.bin)[part]
        share = (rows.replay_share if replay else rows.share)[part]
        logits = rows.logits[part]
        probs = torch.softmax(logits, -1)
        sums = share.sum(-1, keepdim=True)  # [r, 1]
        # The largest probability is at least 1 / K, so this logarithm cannot underflow.
        scale = logits.amax(-1) - probs.amax(-1).log_()
        loss = torch.dot(sums.squeeze(-1), scale) - (share * logits.gather(-1, index)).sum()
        self.losses[2 if replay else 1] += loss
        factor = self.factors.replay_value if replay else self.factors.value
        return probs.mul_(sums * factor).scatter_add_(-1, index, share * -factor)

    def _actor(self, part: slice) -> Tensor:
        """Gradient by the policy's outputs [r, R]; adds the loss."""
        raw, action = self.rows.raw[part], self.rows.action[part]
        weight, advantage = self.rows.weight[part], self.rows.advantage[part]
        entropy = self.policy.entropy(raw)
        gain = torch.addcmul(self.factors.entropy * entropy, self.policy.log_prob(raw, action), advantage)
        self.losses[0] -= torch.dot(weight, gain)
        self.losses[3] += entropy.sum()
        scaled = weight * -self.factors.policy
        return self.policy.gradient(raw, action, scaled * advantage, scaled * self.factors.entropy)

    def _layers(self, part: slice, tops: dict[str, Tensor], by_feat: Tensor | None) -> None:
        """From the gradients by the outputs down to the first layers, and on to features [r, F] if given."""
        # By head: gradient by the outputs of the map above, and the weight of that map.
        above = {
            name: (top, self.critic_out if name == "critic" else self.nets.actor.weight)
            for name, top in tops.items()
        }
        for level in reversed(range(len(self.rows.layers))):
            heads, unit, inverse = self.rows.layers[level]
            names = [name for name in tops if name in heads]
            if not names:
                continue
            first = heads.index(names[0])
            slots = slice(first, first + len(names))
            unit, inverse = unit[part, slots], inverse[part, slots]
            scale = self.scales[level][slots]  # [l, U]
            scaled = unit * scale  # [r, l, U]
            active, grad = F.silu(scaled), torch.empty_like(scaled)
            for slot, name in enumerate(names):
                by_output, weight = above[name]
                torch.mm(by_output, weight, out=grad[:, slot])
                self._weight_grads(name, level + 1, by_output, active[:, slot])
            self.by_scales[level][slots] += norm_silu_backward(grad, unit, inverse, scale, scaled)
            for slot, name in enumerate(names):
                above[name] = (grad[:, slot], getattr(self.nets, name).layers[level].weight)
            if level == 0:
                self._first(part, names, grad, by_feat)

    def _weight_grads(self, name: str, level: int, by_output: Tensor, read: Tensor) -> None:
        """Add what one affine map's weight and bias get."""
        head = self.grads[name]
        target: Any = head if level == len(head.layers) else head.layers[level]
        torch.addmm(target.weight, by_output.t(), read, out=target.weight)
        target.bias.add_(by_output.sum(0))

    def _first(self, part: slice, names: list[str], grad: Tensor, by_feat: Tensor | None) -> None:
        """First layers: one product for critic and actor; grad [r, l, U]."""
        total = self.by_first[: grad[0].numel()]
        torch.addmm(total, grad.flatten(1).t(), self.rows.feat[part], out=total)
        bias = grad.sum(0)  # [l, U]
        for slot, name in enumerate(names):
            self.grads[name].layers[0].bias.add_(bias[slot])
        if by_feat is not None:
            torch.mm(grad[:, 0], self.nets.critic.layers[0].weight, out=by_feat)


def norm_silu_backward(grad: Tensor, unit: Tensor, inverse: Tensor, scale: Tensor, scaled: Tensor) -> Tensor:
    """Gradient [l, U] by scale; `grad`, by a layer's output [r, l, U], becomes that by its norm's input.

    scaled: unit * scale, used up.
    """
    torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=grad)
    torch.mul(grad, unit, out=scaled)
    by_scale = scaled.sum(0)
    along = scaled.mul_(scale).mean(-1, keepdim=True)  # [r, l, 1]
    grad.mul_(scale).addcmul_(unit, along, value=-1.0).mul_(inverse)
    return by_scale


def flatten(head: Head) -> tuple[Tensor, ...]:
    """All tensors of a head: layer by layer, then its output."""
    return (*(tensor for layer in head.layers for tensor in layer), head.weight, head.bias)


def unflatten(tensors: tuple[Tensor, ...]) -> Head:
    """Inverse of `flatten`."""
    layers = tuple(Layer(*tensors[i : i + 3]) for i in range(0, len(tensors) - 2, 3))
    return Head(layers, *tensors[-2:])
