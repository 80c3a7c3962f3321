"""The posterior rollout of `learner.nn.bptt` on CPUs, in as few calls as it can be done.

A step on 16 rows is forty operations of a few microseconds, so what counts is how many there are and what
calling them costs. Here nothing is allocated inside the loops, every view is cut before them, weights lie as
products of few rows read them, and the way back finds activations where the way there has left them.

Letters: see `learner.nn.bptt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn import bptt
from learner.nn.bptt import UPDATE_BIAS, CoreWeights, PosteriorWeights, RowGrads, weight_grads
from learner.nn.categorical import mix, thresholds
from learner.nn.lanes import alone

aten = torch.ops.aten


def posterior_rollout(
    deter: Tensor,
    stoch: Tensor,
    drive: Tensor,
    projected: Tensor,
    keep: Tensor,
    uniform: Tensor,
    core: CoreWeights,
    posterior: PosteriorWeights,
    unimix: float,
    choose: bptt.ChooseSteps = bptt.as_it_is,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bptt.posterior_rollout`; in place where that can be: float32 on CPUs, steps not compiled."""
    state = (deter, stoch, drive, projected, keep, uniform)
    plain = all(x.dtype == torch.float32 for x in (*state, *core, *posterior))
    if deter.is_cuda or not plain or choose is not bptt.as_it_is or torch.is_autocast_enabled("cpu"):
        return bptt.posterior_rollout(*state, core, posterior, unimix, choose)
    return _Rollout.apply(unimix, *state, *core, *posterior)  # type: ignore[return-value]


class _Normed(NamedTuple):
    """RMS norm and SiLU of one layer."""

    unit: Tensor  # [..., U], divided by the root mean square; before: what is normed
    inverse: Tensor  # [..., 1], one over the root mean square
    active: Tensor  # [..., U], output

    @classmethod
    def like(cls, x: Tensor, *shape: int) -> _Normed:
        return cls(x.new_empty(*shape), x.new_empty(*shape[:-1], 1), x.new_empty(*shape))

    def by_step(self) -> list[_Normed]:
        return [_Normed(*parts) for parts in zip(*(x.unbind() for x in self), strict=True)]

    def apply(self, scale: Tensor, eps: Tensor) -> None:
        inverse, active = self.inverse, self.active
        torch.linalg.vector_norm(self.unit, dim=-1, keepdim=True, out=inverse)
        torch.addcmul(eps, inverse, inverse, value=1.0 / active.shape[-1], out=inverse)
        self.unit.mul_(inverse.rsqrt_())
        F.silu(torch.mul(self.unit, scale, out=active), inplace=True)

    def undo(self, grad: Tensor, scale: Tensor, out: Tensor) -> None:
        """Fill `out` with the gradient before the norm; `grad`, by `active`, becomes that before SiLU."""
        scaled = torch.mul(self.unit, scale)
        aten.silu_backward.grad_input(grad, scaled, grad_input=grad)
        torch.mul(grad, scale, out=out)
        along = torch.mul(out, self.unit, out=scaled).sum(-1, keepdim=True)
        out.addcmul_(self.unit, along, value=-1.0 / out.shape[-1]).mul_(self.inverse)


class _Kept(NamedTuple):
    """What the way there leaves behind."""

    old: Tensor  # [T, B, D], deter a step begins with
    old_stoch: Tensor  # [T, B, Z]
    embedded: _Normed  # [T, B, 2, U]
    hidden: _Normed  # [T, B, D]
    gates: Tensor  # [T, G, B, 3d]: sigmoid of reset, candidate, sigmoid of update
    squashed: Tensor  # [T, G, B, d], tanh of reset times candidate
    change: Tensor  # [T, G, B, d], from the old deter to that
    deter: Tensor  # [T, B, D]
    read: _Normed  # [T, B, U]
    soft: Tensor  # [T, B, C, S]
    stoch: Tensor  # [T, B, C, S]

    @classmethod
    def allocate(cls, deter: Tensor, stoch: Tensor, uniform: Tensor, core: CoreWeights) -> _Kept:
        time, rows, size = uniform.shape[0], *deter.shape
        blocks, units, variables = core.own.shape[0], core.deter_bias.shape[0], uniform.shape[2]
        new, block = deter.new_empty, (time, blocks, rows, size // blocks)
        classes = stoch.shape[1] // variables
        return cls(
            old=new(time, rows, size),
            old_stoch=new(time, rows, stoch.shape[1]),
            embedded=_Normed.like(deter, time, rows, 2, units),
            hidden=_Normed.like(deter, time, rows, size),
            gates=new(*block[:3], 3 * block[3]),
            squashed=new(block),
            change=new(block),
            deter=new(time, rows, size),
            read=_Normed.like(deter, time, rows, units),
            soft=new(time, rows, classes, variables),
            stoch=new(time, rows, classes, variables),
        )

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> _Kept:
        """From its tensors, one after the other."""
        left = iter(flat)
        norms = ("embedded", "hidden", "read")
        return cls(
            *(_Normed(*islice(left, 3)) if name in norms else next(left) for name in cls._fields)  # type: ignore[arg-type]
        )


def _blocked(x: Tensor, blocks: int) -> Tensor:
    """[..., B, D] -> [..., G, B, d], the same memory."""
    return x.unflatten(-1, (blocks, -1)).transpose(-2, -3)


def _turned(weight: Tensor) -> Tensor:
    """The transpose in its own memory: with few rows it is multiplied twice as fast."""
    return weight.t().contiguous()


def _forward(
    deter: Tensor,
    stoch: Tensor,
    drive: Tensor,
    projected: Tensor,
    keep: Tensor,
    uniform: Tensor,
    core: CoreWeights,
    posterior: PosteriorWeights,
    unimix: float,
) -> _Kept:
    """The loop from the first step to the last."""
    kept, blocks = _Kept.allocate(deter, stoch, uniform, core), core.own.shape[0]
    rows, classes, variables = kept.stoch.shape[1:]
    eps, own = deter.new_full((), 1e-4), kept.squashed.new_empty(kept.squashed.shape[1:])
    own_rows, logits = own.transpose(0, 1), kept.old_stoch.new_empty(kept.old_stoch.shape[1:])
    by_class = logits.view(rows, classes, variables)
    # As in `imagine_rows`: the steps of what is still below the uniform are the sample.
    below = deter.new_ones(rows, classes + 1, variables)
    below[:, -1] = 0.0
    inside, behind, inner = below[:, :-1], below[:, 1:], below[:, 1:-1]
    embed_deter, embed_stoch = _turned(core.deter_in), _turned(core.stoch_in)
    read_deter, read_out = _turned(posterior.deter_in), _turned(posterior.logits)
    gates_bias = core.gates_bias.clone()
    gates_bias[..., -own.shape[-1] :] += UPDATE_BIAS
    for step in _Step.cut(kept, drive, projected, keep, thresholds(uniform, classes, unimix), blocks):
        torch.mul(deter, step.keep, out=step.old_rows)
        torch.mul(stoch, step.keep, out=step.old_stoch)
        torch.addmm(core.deter_bias, step.old_rows, embed_deter, out=step.embedded_deter)
        torch.addmm(core.stoch_bias, step.old_stoch, embed_stoch, out=step.embedded_stoch)
        step.embedded.apply(core.in_scale, eps)
        torch.addmm(step.drive, step.inputs, core.shared, out=step.hidden.unit)
        torch.bmm(step.old, core.own, out=own)
        step.hidden_rows.add_(own_rows)
        step.hidden.apply(core.scale, eps)
        torch.baddbmm(gates_bias, step.hidden_active, core.gates, out=step.gates)
        step.openings.sigmoid_()
        torch.mul(step.reset, step.candidate, out=step.squashed).tanh_()
        torch.sub(step.squashed, step.old, out=step.change)
        torch.addcmul(step.old, step.update, step.change, out=step.after)
        torch.addmm(step.projected, step.deter, read_deter, out=step.read.unit)
        step.read.apply(posterior.scale, eps)
        torch.addmm(posterior.logits_bias, step.read.active, read_out, out=logits)
        torch.softmax(by_class, 1, out=step.soft)
        torch.lt(step.likely.cumsum(1), step.threshold, out=inner)
        torch.sub(inside, behind, out=step.stoch)
        deter, stoch = step.deter, step.flat_stoch
    return kept


class _Step(NamedTuple):
    """The views of one step on the way there."""

    keep: Tensor  # [B, 1]
    drive: Tensor  # [B, D]
    projected: Tensor  # [B, U]
    threshold: Tensor  # [B, C - 1, S]
    old_rows: Tensor  # [B, D]
    old: Tensor  # [G, B, d]
    old_stoch: Tensor  # [B, Z]
    embedded_deter: Tensor  # [B, U]
    embedded_stoch: Tensor  # [B, U]
    inputs: Tensor  # [B, 2U], both after norm and SiLU
    hidden_rows: Tensor  # [B, G, d], before the norm
    hidden_active: Tensor  # [G, B, d]
    gates: Tensor  # [G, B, 3d]
    openings: Tensor  # [G, B, 2, d], reset and update
    reset: Tensor  # [G, B, d]
    candidate: Tensor  # [G, B, d]
    update: Tensor  # [G, B, d]
    squashed: Tensor  # [G, B, d]
    change: Tensor  # [G, B, d]
    deter: Tensor  # [B, D]
    after: Tensor  # [G, B, d], deter
    soft: Tensor  # [B, C, S]
    likely: Tensor  # [B, C - 1, S], soft
    stoch: Tensor  # [B, C, S]
    flat_stoch: Tensor  # [B, Z]
    embedded: _Normed
    hidden: _Normed
    read: _Normed

    @classmethod
    def cut(
        cls, kept: _Kept, drive: Tensor, projected: Tensor, keep: Tensor, threshold: Tensor, blocks: int
    ) -> list[_Step]:
        gates = kept.gates.unflatten(-1, (3, -1))  # [T, G, B, 3, d]
        views = (
            *(keep, drive, projected, threshold, kept.old, _blocked(kept.old, blocks), kept.old_stoch),
            *kept.embedded.unit.unbind(2),
            kept.embedded.active.flatten(2),
            kept.hidden.unit.unflatten(-1, (blocks, -1)),
            _blocked(kept.hidden.active, blocks),
            *(kept.gates, gates[..., ::2, :], *gates.unbind(-2), kept.squashed, kept.change),
            *(kept.deter, _blocked(kept.deter, blocks), kept.soft, kept.soft[:, :, :-1]),
            *(kept.stoch, kept.stoch.flatten(2)),
        )
        norms = (kept.embedded.by_step(), kept.hidden.by_step(), kept.read.by_step())
        return [cls(*parts) for parts in zip(*(view.unbind() for view in views), *norms, strict=True)]


class _Grads(NamedTuple):
    """Gradients that the way back fills in: before the norms, and of what norm and SiLU put out."""

    logits: Tensor  # [T, B, Z]
    gates: Tensor  # [T, G, B, 3d]
    read: Tensor  # [T, B, U]
    read_x: Tensor  # [T, B, U]; in the end before SiLU, as the next two
    hidden: Tensor  # [T, B, D]
    hidden_x: Tensor  # [T, B, D]
    embedded: Tensor  # [T, B, 2, U]
    embedded_x: Tensor  # [T, B, 2, U]

    @classmethod
    def like(cls, kept: _Kept) -> _Grads:
        norms = (x.unit for x in (kept.read, kept.hidden, kept.embedded) for _ in range(2))
        logits, *norms = (torch.empty_like(x) for x in (kept.old_stoch, *norms))
        gates = kept.gates.new_empty(kept.gates.transpose(0, 1).shape).transpose(0, 1)  # as sums read them
        return cls(logits, gates, *norms)

    def rows(self, kept: _Kept) -> RowGrads:
        """All that weight gradients are made of."""
        pairs = ((self.read_x, kept.read), (self.hidden_x, kept.hidden), (self.embedded_x, kept.embedded))
        scales = [x.mul_(norm.unit).flatten(0, 1).sum(0) for x, norm in pairs]
        actives = (kept.read.active, kept.hidden.active, kept.embedded.active)
        return RowGrads(self.logits, self.read, self.gates, self.hidden, self.embedded, *actives, *scales)


class _Back(NamedTuple):
    """The views of one step on the way back; gradients where `_Grads` has them."""

    soft: Tensor  # [B, C, S], forward value
    reset: Tensor  # [G, B, d], forward value
    candidate: Tensor  # [G, B, d], forward value
    update: Tensor  # [G, B, d], forward value
    squashed: Tensor  # [G, B, d], forward value
    change: Tensor  # [G, B, d], forward value
    keep: Tensor  # [B, 1]
    keep_sample: Tensor  # [B, 1, 1], times the share that uniform mixing passes on
    logits: Tensor  # [B, C, S]
    flat_logits: Tensor  # [B, Z]
    by_read: Tensor  # [B, U], after the norm
    by_reading: Tensor  # [B, U], before it
    by_gates: Tensor  # [G, B, 3d]
    by_reset: Tensor  # [G, B, d]
    by_candidate: Tensor  # [G, B, d]
    by_update: Tensor  # [G, B, d]
    by_active: Tensor  # [B, D], after the norm
    by_active_blocks: Tensor  # [G, B, d]
    by_hidden: Tensor  # [B, D], before it
    by_hidden_blocks: Tensor  # [G, B, d]
    by_inputs: Tensor  # [B, 2, U], after the norm
    by_flat_inputs: Tensor  # [B, 2U]
    by_embedded: Tensor  # [B, 2, U], before it
    by_embedded_deter: Tensor  # [B, U]
    by_embedded_stoch: Tensor  # [B, U]
    embedded: _Normed
    hidden: _Normed
    read: _Normed

    @classmethod
    def cut(cls, kept: _Kept, keep: Tensor, unimix: float, grads: _Grads) -> list[_Back]:
        blocks, by_gates = kept.gates.shape[1], grads.gates.unflatten(-1, (3, -1))  # [T, G, B, 3, d]
        views = (
            *(kept.soft, *kept.gates.unflatten(-1, (3, -1)).unbind(-2), kept.squashed, kept.change),
            *(keep, (keep * (1.0 - unimix)).unsqueeze(-1)),
            *(grads.logits.view_as(kept.soft), grads.logits, grads.read_x, grads.read),
            *(grads.gates, *by_gates.unbind(-2)),
            *(grads.hidden_x, _blocked(grads.hidden_x, blocks), grads.hidden, _blocked(grads.hidden, blocks)),
            *(grads.embedded_x, grads.embedded_x.flatten(2), grads.embedded, *grads.embedded.unbind(2)),
        )
        norms = (kept.embedded.by_step(), kept.hidden.by_step(), kept.read.by_step())
        return [cls(*parts) for parts in zip(*(view.unbind() for view in views), *norms, strict=True)]


def _backward(
    kept: _Kept,
    keep: Tensor,
    core: CoreWeights,
    posterior: PosteriorWeights,
    unimix: float,
    by_deter: Tensor,
    by_probs: Tensor,
) -> _Grads:
    """The loop from the last step to the first, from the gradients of deter and mixed probabilities."""
    grads, own = _Grads.like(kept), torch.empty_like(kept.squashed[0])  # [G, B, d]
    gates_back, own_back = (w.transpose(1, 2).contiguous() for w in (core.gates, core.own))
    shared_back, own_rows, held = _turned(core.shared), own.transpose(0, 1), torch.empty_like(own)
    # Gradients of the state; before the first step there is nobody to hand them to.
    deter = by_deter[-1].clone(memory_format=torch.contiguous_format)  # [B, D]
    probs = (by_probs[-1] * (1.0 - unimix)).contiguous()  # [B, C, S]
    block, flat_probs = _blocked(deter, own.shape[0]), probs.flatten(1)
    rows, held_rows = block.transpose(0, 1), held.transpose(0, 1)  # [B, G, d]
    outside = zip(by_deter.unbind(), (by_probs * (1.0 - unimix)).unbind(), strict=True)
    befores = [None, *outside][:-1]
    for step, before in zip(reversed(_Back.cut(kept, keep, unimix, grads)), reversed(befores), strict=True):
        aten._softmax_backward_data.out(probs, step.soft, 1, torch.float32, grad_input=step.logits)
        torch.mm(step.flat_logits, posterior.logits, out=step.by_read)
        step.read.undo(step.by_read, posterior.scale, step.by_reading)
        torch.addmm(deter, step.by_reading, posterior.deter_in, out=deter)
        torch.mul(block, step.change, out=own)
        aten.sigmoid_backward.grad_input(own, step.update, grad_input=step.by_update)
        torch.mul(block, step.update, out=held)
        rows.sub_(held_rows)  # what the update gate lets stay
        aten.tanh_backward.grad_input(held, step.squashed, grad_input=held)
        torch.mul(held, step.reset, out=step.by_candidate)
        aten.sigmoid_backward.grad_input(held.mul_(step.candidate), step.reset, grad_input=step.by_reset)
        torch.bmm(step.by_gates, gates_back, out=step.by_active_blocks)
        step.hidden.undo(step.by_active, core.scale, step.by_hidden)
        torch.mm(step.by_hidden, shared_back, out=step.by_flat_inputs)
        step.embedded.undo(step.by_inputs, core.in_scale, step.by_embedded)
        if before is None:
            break
        torch.bmm(step.by_hidden_blocks, own_back, out=own)
        rows.add_(own_rows)
        torch.addmm(deter, step.by_embedded_deter, core.deter_in, out=deter)
        torch.addcmul(before[0], deter, step.keep, out=deter)
        torch.mm(step.by_embedded_stoch, core.stoch_in, out=flat_probs)
        torch.addcmul(before[1], probs, step.keep_sample, out=probs)
    return grads


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unimix: float, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        core, posterior = CoreWeights(*args[6:16]), PosteriorWeights(*args[16:])
        deter, stoch, drive, projected, keep, uniform = args[:6]
        with alone(deter):
            kept = _forward(deter, stoch, drive, projected, keep, uniform, core, posterior, unimix)
        flat = [x for part in kept for x in (part if isinstance(part, _Normed) else (part,))]
        ctx.unimix = unimix
        ctx.save_for_backward(keep, *core, *posterior, *flat)
        return kept.deter, mix(kept.soft, unimix), kept.stoch

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Any, ...]:
        keep, *saved = ctx.saved_tensors
        core, posterior = CoreWeights(*saved[:10]), PosteriorWeights(*saved[10:14])
        kept = _Kept.of(saved[14:])
        by_deter, by_probs, by_stoch = outer
        with alone(keep[0].expand_as(kept.deter[0])):
            grads = _backward(kept, keep, core, posterior, ctx.unimix, by_deter, by_probs + by_stoch)
        rows = grads.rows(kept)
        by_weights = weight_grads(rows, kept.old, kept.old_stoch, kept.deter, core.own.shape[0])
        return None, None, None, rows.hidden, rows.read, None, None, *by_weights
