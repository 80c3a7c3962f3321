"""The posterior loop of an RSSM and its gradient, written out: here alone time steps wait for one another.

Autograd through T steps runs some 200 small operations per step and accumulates every weight gradient T
times. Here the forward pass keeps a few tensors per step, everything in the backward pass that depends on
them alone is computed for all steps at once, the backward loop moves only the gradient of the state, and each
weight gradient is one matrix product at the end. `reference_rollout` is the same loop under autograd and the
oracle of its tests.

Letters: B batch, T time, D deter, S variables, C classes, Z = C*S, U hidden units, G blocks, d = D / G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.categorical import mix, sample_one_hot
from learner.nn.lanes import alone
from learner.nn.layers import NormGrad, rms_norm

UPDATE_BIAS = -1.0  # the update gate starts mostly closed: memory by default


class CoreWeights(NamedTuple):
    """Weights of the recurrent step, cut as the loop reads them."""

    deter_in: Tensor  # [U, D]
    deter_bias: Tensor  # [U]
    stoch_in: Tensor  # [U, Z]
    stoch_bias: Tensor  # [U]
    in_scale: Tensor  # [2, U], norm scales of the embedded deter and stoch
    own: Tensor  # [G, d, d], hidden layer from a block's own part of deter
    shared: Tensor  # [2U, D], hidden layer from embedded deter and stoch
    scale: Tensor  # [D]
    gates: Tensor  # [G, d, 3d]
    gates_bias: Tensor  # [G, 1, 3d]


class PosteriorWeights(NamedTuple):
    """Weights of the posterior, without those that read tokens."""

    deter_in: Tensor  # [U, D]
    scale: Tensor  # [U]
    logits: Tensor  # [Z, U]
    logits_bias: Tensor  # [Z]


class CoreOut(NamedTuple):
    """The new state and what the backward pass wants of the way there."""

    deter: Tensor  # [B, D]
    embedded: Tensor  # [B, 2, U], before norm
    hidden: Tensor  # [B, D], before norm
    gates: Tensor  # [G, B, 3d], before the nonlinearities: reset, candidate, update


class Observed(NamedTuple):
    """One step of the forward loop: the new state, and what the backward loop wants."""

    deter: Tensor  # [B, D]
    stoch: Tensor  # [B, C, S], sampled
    soft: Tensor  # [B, C, S], before uniform mixing
    embedded: Tensor  # [B, 2, U]
    hidden: Tensor  # [B, D]
    gates: Tensor  # [G, B, 3d]
    read: Tensor  # [B, U], hidden layer of the posterior


class PosteriorOut(NamedTuple):
    """Softmax of the posterior logits and the hidden layer before its norm."""

    soft: Tensor  # [B, C, S], before uniform mixing
    hidden: Tensor  # [B, U]


def core_step(deter: Tensor, stoch: Tensor, drive: Tensor, w: CoreWeights) -> CoreOut:
    """Block GRU step: deter [B, D], stoch [B, Z], drive [B, D] (action part and bias of the hidden layer)."""
    rows, blocks = deter.shape[0], w.own.shape[0]
    embedded = torch.cat(
        [F.linear(deter, w.deter_in, w.deter_bias), F.linear(stoch, w.stoch_in, w.stoch_bias)], -1
    ).view(rows, 2, -1)  # [B, 2, U]
    inputs = F.silu(rms_norm(embedded, w.in_scale)).flatten(1)  # [B, 2U]
    blocked = deter.view(rows, blocks, -1).transpose(0, 1)  # [G, B, d]
    own = torch.bmm(blocked, w.own).transpose(0, 1)  # [B, G, d]
    hidden = (torch.addmm(drive, inputs, w.shared).view(own.shape) + own).view(rows, -1)  # [B, D]
    active = F.silu(rms_norm(hidden, w.scale)).view(rows, blocks, -1).transpose(0, 1)  # [G, B, d]
    gates = torch.baddbmm(w.gates_bias, active, w.gates)  # [G, B, 3d]
    reset, candidate, update = gates.float().chunk(3, -1)
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    after = torch.lerp(blocked, candidate, torch.sigmoid(update + UPDATE_BIAS))  # [G, B, d]
    return CoreOut(after.transpose(0, 1).reshape(rows, -1), embedded, hidden, gates)


def posterior_step(deter: Tensor, projected: Tensor, w: PosteriorWeights, stoch: int) -> PosteriorOut:
    """Posterior of `stoch` variables from deter [B, D] and the projected tokens [B, U]."""
    hidden = torch.addmm(projected, deter, w.deter_in.t())
    logits = F.linear(F.silu(rms_norm(hidden, w.scale)), w.logits, w.logits_bias)
    return PosteriorOut(torch.softmax(logits.float().view(deter.shape[0], -1, stoch), -2), hidden)


def observe_step(
    deter: Tensor,
    stoch: Tensor,
    drive: Tensor,
    projected: Tensor,
    keep: Tensor,
    uniform: Tensor,
    core: CoreWeights,
    posterior: PosteriorWeights,
    unimix: float,
) -> Observed:
    """One step of the forward loop; arguments as of `posterior_rollout`, without their time axis."""
    out = core_step(deter * keep, stoch * keep, drive, core)
    read = posterior_step(out.deter, projected, posterior, uniform.shape[-1])
    sample = sample_one_hot(read.soft, uniform, unimix)
    return Observed(out.deter, sample, read.soft, out.embedded, out.hidden, out.gates, read.hidden)


def reference_rollout(
    deter: Tensor,
    stoch: Tensor,
    drive: Tensor,
    projected: Tensor,
    keep: Tensor,
    uniform: Tensor,
    core: CoreWeights,
    posterior: PosteriorWeights,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`posterior_rollout` as a plain loop for autograd."""
    deters, probs, stochs = [], [], []
    for t in range(drive.shape[0]):
        deter = core_step(deter * keep[t], stoch * keep[t], drive[t], core).deter
        soft = posterior_step(deter, projected[t], posterior, uniform.shape[-1]).soft
        sample = sample_one_hot(soft, uniform[t], unimix)
        stoch = sample.flatten(1)
        deters.append(deter)
        probs.append(mix(soft, unimix))
        stochs.append(sample)
    return torch.stack(deters), torch.stack(probs), torch.stack(stochs)


LoopBody = Callable[..., tuple[Tensor, ...]]
ChooseSteps = Callable[..., LoopBody]  # (a loop body, arguments it will be called with) -> what to call


def as_it_is(body: LoopBody, *args: Any) -> LoopBody:
    del args
    return body


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
    choose: ChooseSteps = as_it_is,
) -> tuple[Tensor, Tensor, Tensor]:
    """Filter T rows: (deter [T, B, D], mixed probs [T, B, C, S], sampled stoch [T, B, C, S]).

    deter [B, D] and stoch [B, Z] precede row 0 and get no gradient; drive [T, B, D]; projected [T, B, U];
    keep [T, B, 1] is 0 where the state is forgotten; uniform [T, B, S]. The gradient of a sample is that
    of its probabilities (straight-through). `choose` is asked once per loop for the body to use.
    """
    state = (deter, stoch, drive, projected, keep, uniform)
    return _Rollout.apply(choose, unimix, *state, *core, *posterior)  # type: ignore[return-value]


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        choose, unimix, deter, stoch, drive, projected, keep, uniform = args[:8]
        core, posterior = CoreWeights(*args[8:18]), PosteriorWeights(*args[18:])
        kept: list[tuple[Tensor, ...]] = []
        before = (deter, stoch)

        def inputs(t: int) -> tuple[Any, ...]:
            return (deter, stoch, drive[t], projected[t], keep[t], uniform[t], core, posterior, unimix)

        with alone(deter):
            step = choose(observe_step, *inputs(0))
            for t in range(drive.shape[0]):
                kept.append(step(*inputs(t)))
                deter, stoch = kept[-1][0], kept[-1][1].flatten(1)
        saved = Observed(*(torch.stack(parts) for parts in zip(*kept, strict=True)))
        ctx.unimix, ctx.choose = unimix, choose
        ctx.save_for_backward(*before, keep, *saved, *core, *posterior)
        return saved.deter, mix(saved.soft, unimix), saved.stoch

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        (deter, stoch, keep), saved = tensors[:3], Observed(*tensors[3:10])  # [T, B, ...]
        core, posterior = CoreWeights(*tensors[10:20]), PosteriorWeights(*tensors[20:])
        # Inputs of every step, masked where an episode begins.
        deter = torch.cat([deter.unsqueeze(0), saved.deter[:-1]]) * keep  # [T, B, D]
        stoch = torch.cat([stoch.unsqueeze(0), saved.stoch[:-1].flatten(2)]) * keep  # [T, B, Z]
        rows = _backward_loop(deter, keep, saved, core, posterior, ctx.unimix, grads, ctx.choose)
        by_weights = weight_grads(rows, deter, stoch, saved.deter, core.own.shape[0])
        return None, None, None, None, rows.hidden, rows.read, None, None, *by_weights


class RowGrads(NamedTuple):
    """Gradients of pre-activations and of the norms' scales, and what weight gradients pair them with."""

    logits: Tensor  # [T, B, Z]
    read: Tensor  # [T, B, U]
    gates: Tensor  # [T, G, B, 3d]
    hidden: Tensor  # [T, B, D]
    embedded: Tensor  # [T, B, 2, U]
    read_active: Tensor  # [T, B, U], output of norm and SiLU
    hidden_active: Tensor  # [T, B, D]
    embedded_active: Tensor  # [T, B, 2, U]
    read_scale: Tensor  # [U]
    hidden_scale: Tensor  # [D]
    embedded_scale: Tensor  # [2, U]


def _gate_grads(deter: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Per-entry derivatives of the new deter: by the gates [T, G, B, 3, d] and by the old deter [T, B, D]."""
    time, blocks, rows, _ = gates.shape
    reset, candidate, update = gates.float().unflatten(-1, (3, -1)).unbind(-2)  # [T, G, B, d]
    reset, update = torch.sigmoid(reset), torch.sigmoid(update + UPDATE_BIAS)
    squashed = torch.tanh(reset * candidate)
    old = deter.view(time, rows, blocks, -1).transpose(1, 2)  # [T, G, B, d]
    inner = update * (1.0 - squashed.square()) * reset
    by_update = (squashed - old) * update * (1.0 - update)
    slopes = torch.stack([inner * candidate * (1.0 - reset), inner, by_update], -2)  # [T, G, B, 3, d]
    return slopes, (1.0 - update).transpose(1, 2).reshape(deter.shape)


class Undo(NamedTuple):
    """Norm and SiLU of one layer and step, as the way back reads them."""

    unit: Tensor
    gain: Tensor

    def __call__(self, grad: Tensor) -> Tensor:
        """Gradient before norm and SiLU from that after them."""
        scaled = grad * self.gain
        return torch.addcmul(scaled, self.unit, (scaled * self.unit).mean(-1, keepdim=True), value=-1.0)


class Passed(NamedTuple):
    """What one step of the backward loop finds: values of its own step, and gradients of the step before."""

    soft: Tensor  # [B, C, S]
    slopes: Tensor  # [G, B, 3, d]
    keeps_old: Tensor  # [B, D]
    keep: Tensor  # [B, 1]
    read: Undo  # [B, U]
    hidden: Undo  # [B, D]
    embedded: Undo  # [B, 2, U]
    by_deter: Tensor  # [B, D], from outside on the state one step before
    by_probs: Tensor  # [B, C, S], likewise


class BackWeights(NamedTuple):
    """Weights as the way back reads them."""

    logits: Tensor  # [Z, U]
    read_deter: Tensor  # [U, D]
    gates: Tensor  # [G, 3d, d]
    own: Tensor  # [G, d, d]
    shared: Tensor  # [D, 2U]
    deter_in: Tensor  # [U, D]
    stoch_in: Tensor  # [U, Z]


def retreat_step(
    grad_deter: Tensor, grad_probs: Tensor, passed: Passed, w: BackWeights, unimix: float
) -> tuple[Tensor, ...]:
    """One step of the backward loop, from the gradients of the state [B, D] and probabilities [B, C, S].

    The first five tensors are those of `RowGrads`, in order; then the gradients of what the last three's
    norms put out, and the same two gradients one step before.
    """
    batch, blocks = grad_deter.shape[0], w.own.shape[0]
    weighted = grad_probs * passed.soft  # [B, C, S]
    logits = torch.addcmul(weighted, passed.soft, weighted.sum(-2, keepdim=True), value=-1.0).flatten(1)
    read_x = logits @ w.logits  # [B, U]
    read_a = passed.read(read_x)
    grad_deter = torch.addmm(grad_deter, read_a, w.read_deter)  # [B, D]
    blocked = grad_deter.view(batch, blocks, 1, -1).transpose(0, 1)  # [G, B, 1, d]
    gates = (blocked * passed.slopes).flatten(-2)  # [G, B, 3d]
    hidden_x = torch.bmm(gates, w.gates).transpose(0, 1).reshape(batch, -1)  # [B, D]
    hidden_a = passed.hidden(hidden_x)
    embedded_x = (hidden_a @ w.shared).view(batch, 2, -1)  # [B, 2, U]
    embedded_a = passed.embedded(embedded_x)
    own = torch.bmm(hidden_a.view(batch, blocks, -1).transpose(0, 1), w.own).transpose(0, 1)
    through = torch.addcmul(own.reshape(batch, -1), grad_deter, passed.keeps_old)
    through = torch.addmm(through, embedded_a[:, 0], w.deter_in)
    before = torch.addcmul(passed.by_deter, through, passed.keep)
    sampled = (embedded_a[:, 1] @ w.stoch_in) * (passed.keep * (1.0 - unimix))
    probs = passed.by_probs + sampled.view_as(passed.by_probs)
    return logits, read_a, gates, hidden_a, embedded_a, read_x, hidden_x, embedded_x, before, probs


def _backward_loop(
    deter: Tensor,
    keep: Tensor,
    saved: Observed,
    core: CoreWeights,
    posterior: PosteriorWeights,
    unimix: float,
    grads: tuple[Any, ...],
    choose: ChooseSteps,
) -> RowGrads:
    """Carry the state's gradient from the last step to the first; grads are those of the three outputs."""
    by_deter, by_probs, by_stoch = grads
    outer = (by_probs + by_stoch) * (1.0 - unimix)  # the mixing passes this share on
    read, hidden = NormGrad.of(saved.read, posterior.scale), NormGrad.of(saved.hidden, core.scale)
    embedded = NormGrad.of(saved.embedded, core.in_scale)
    slopes, keeps_old = _gate_grads(deter, saved.gates)
    weights = BackWeights(
        logits=posterior.logits,
        read_deter=posterior.deter_in,
        gates=core.gates.transpose(1, 2),
        own=core.own.transpose(1, 2),
        shared=core.shared.t(),
        deter_in=core.deter_in,
        stoch_in=core.stoch_in,
    )

    def passed(t: int) -> Passed:
        before = max(t - 1, 0)  # what the first row hands on is not used
        return Passed(
            soft=saved.soft[t],
            slopes=slopes[t],
            keeps_old=keeps_old[t],
            keep=keep[t],
            read=Undo(read.unit[t], read.gain[t]),
            hidden=Undo(hidden.unit[t], hidden.gain[t]),
            embedded=Undo(embedded.unit[t], embedded.gain[t]),
            by_deter=by_deter[before],
            by_probs=outer[before],
        )

    grad_deter, grad_probs = by_deter[-1].contiguous(), outer[-1].contiguous()  # as those that follow
    kept: list[tuple[Tensor, ...]] = []
    with alone(grad_deter):
        step = choose(retreat_step, grad_deter, grad_probs, passed(deter.shape[0] - 1), weights, unimix)
        for t in reversed(range(deter.shape[0])):
            *rows, grad_deter, grad_probs = step(grad_deter, grad_probs, passed(t), weights, unimix)
            kept.append(tuple(rows))
    *rows, read_x, hidden_x, embedded_x = (torch.stack(x[::-1]) for x in zip(*kept, strict=True))
    return RowGrads(
        *rows,
        read_active=read.active,
        hidden_active=hidden.active,
        embedded_active=embedded.active,
        read_scale=read.scale_grad(read_x, 1),
        hidden_scale=hidden.scale_grad(hidden_x, 1),
        embedded_scale=embedded.scale_grad(embedded_x, 2),
    )


def weight_grads(rows: RowGrads, old: Tensor, stoch: Tensor, new: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """By core and posterior weights, a product each; steps lead from old, stoch to new [T, B, *]."""
    hidden, embedded, read, logits = (
        x.flatten(0, 1) for x in (rows.hidden, rows.embedded, rows.read, rows.logits)
    )  # [T*B, ...]
    flat_deter = old.flatten(0, 1)  # [T*B, D]

    def split(x: Tensor) -> Tensor:  # [T*B, G*i] -> [G, i, T*B]
        return x.view(x.shape[0], blocks, -1).permute(1, 2, 0)

    gates = rows.gates.transpose(0, 1).flatten(1, 2)  # [G, T*B, 3d]
    inputs = rows.embedded_active.flatten(0, 1).flatten(1)  # [T*B, 2U]
    own = torch.bmm(split(flat_deter), hidden.view(hidden.shape[0], blocks, -1).transpose(0, 1))
    core_grads = CoreWeights(
        deter_in=embedded[:, 0].t() @ flat_deter,
        deter_bias=embedded[:, 0].sum(0),
        stoch_in=embedded[:, 1].t() @ stoch.flatten(0, 1),
        stoch_bias=embedded[:, 1].sum(0),
        in_scale=rows.embedded_scale,
        own=own,
        shared=inputs.t() @ hidden,
        scale=rows.hidden_scale,
        gates=torch.bmm(split(rows.hidden_active.flatten(0, 1)), gates),
        gates_bias=gates.sum(1, keepdim=True),
    )
    posterior_grads = PosteriorWeights(
        deter_in=read.t() @ new.flatten(0, 1),
        scale=rows.read_scale,
        logits=logits.t() @ rows.read_active.flatten(0, 1),
        logits_bias=logits.sum(0),
    )
    return (*core_grads, *posterior_grads)
