"""Posterior rollout by the compiled library: same contract and same gradients as `learner.nn.bptt`.

Letters: T time, B batch, D deter, S variables, C classes, Z = C*S, U hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learner.native.calls import Block, call, fields
from learner.native.library import library
from learner.nn.bptt import CoreWeights, PosteriorWeights

INPUTS = ["deter_start", "stoch_start", "drive", "projected", "keep", "uniform"]
CORE = list(CoreWeights._fields)
POSTERIOR = ["read_in", "read_scale", "logits", "logits_bias"]
KEPT = ["out_deter", "probs", "sample", "soft", "embedded", "pre_hidden", "pre_gates", "read"]
BY = ["by_deter", "by_probs", "by_stoch"]
ROWS = [
    *("logits", "read", "gates", "pre_hidden", "embedded", "before", "before_stoch"),
    *("read_active", "hidden_active", "inputs_active", "read_scale_rows", "scale_rows", "in_scale_rows"),
]
WEIGHT_GRADS = [
    *("deter_in", "deter_bias", "stoch_in", "stoch_bias", "in_scale", "own", "shared", "scale"),
    *("gates_weight", "gates_bias", "read_in", "read_scale", "logits_weight", "logits_bias"),
]


class _Rollout(Block):
    _fields_ = fields(
        "int:time int:batch int:deter int:stoch int:classes int:hidden int:blocks int:threads float:unimix",
        *INPUTS,
        *CORE,
        *POSTERIOR,
        *KEPT,
    )


class _RolloutGrads(Block):
    _fields_ = fields("", *BY, *ROWS, *WEIGHT_GRADS)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `learner.nn.bptt.posterior_rollout`: (deter [T, B, D], mixed probs, sampled stoch [T, B, C, S])."""
    return _Native.apply(deter, stoch, drive, projected, keep, uniform, unimix, *core, *posterior)  # type: ignore[return-value]


def _arguments(
    inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], kept: tuple[Tensor, ...], unimix: float
) -> _Rollout:
    """The structure; inputs, weights and kept in the order of their fields."""
    core = CoreWeights(*weights[:10])
    time, batch, size = inputs[2].shape
    return _Rollout(
        time=time,
        batch=batch,
        deter=size,
        stoch=inputs[5].shape[-1],
        classes=kept[1].shape[2],
        hidden=core.deter_bias.shape[0],
        blocks=core.own.shape[0],
        threads=torch.get_num_threads(),
        unimix=unimix,
        **dict(zip([*INPUTS, *CORE, *POSTERIOR, *KEPT], [*inputs, *weights, *kept], strict=True)),
    )


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.unimix = args[6]
        inputs = tuple(x.detach().contiguous() for x in args[:6])
        weights = tuple(x.detach().contiguous() for x in args[7:])
        time, batch, size = inputs[2].shape
        variables, units = inputs[5].shape[-1], inputs[3].shape[-1]
        stoch = (weights[-1].shape[0] // variables, variables)
        shapes = ((size,), stoch, stoch, stoch, (2 * units,), (size,), (3 * size,), (units,))
        kept = tuple(torch.empty(time, batch, *shape) for shape in shapes)
        call(library().rollout_forward, _arguments(inputs, weights, kept, ctx.unimix))
        ctx.save_for_backward(*inputs, *weights, *kept)
        return kept[0], kept[1], kept[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, weights, kept = saved[:6], saved[6:-8], saved[-8:]
        time, batch, size = kept[0].shape
        z, u, d = weights[-1].shape[0], kept[-1].shape[-1], size
        widths = (z, u, 3 * d, d, 2 * u, d, z, u, d, 2 * u, u, d, 2 * u)
        rows = {name: torch.empty(time, batch, w) for name, w in zip(ROWS, widths, strict=True)}
        by = dict(zip(BY, (g.contiguous() for g in grads), strict=True))
        out = tuple(torch.zeros_like(w) for w in weights)
        call(
            library().rollout_backward,
            _arguments(inputs, weights, kept, ctx.unimix),
            _RolloutGrads(**by, **rows, **dict(zip(WEIGHT_GRADS, out, strict=True))),
        )
        return None, None, rows["pre_hidden"], rows["read"], None, None, None, *out
