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

_CORE = "deter_in deter_bias stoch_in stoch_bias in_scale own shared scale gates gates_bias"
_POSTERIOR = "read_in read_scale logits logits_bias"
_KEPT = "out_deter probs sample soft embedded pre_hidden pre_gates read"
_BY_ROW = (
    "logits read gates pre_hidden embedded before before_stoch read_active hidden_active inputs_active "
    "read_scale_rows scale_rows in_scale_rows"
)


class _Rollout(Block):
    _fields_ = fields(
        "int:time int:batch int:deter int:stoch int:classes int:hidden int:blocks int:threads float:unimix "
        f"deter_start stoch_start drive projected keep uniform {_CORE} {_POSTERIOR} {_KEPT}"
    )


class _RolloutGrads(Block):
    _fields_ = fields(
        f"by_deter by_probs by_stoch {_BY_ROW} deter_in deter_bias stoch_in stoch_bias in_scale own shared scale "
        "gates_weight gates_bias read_in read_scale logits_weight logits_bias"
    )


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
    args: tuple[Tensor, ...], weights: tuple[Tensor, ...], kept: tuple[Tensor, ...], unimix: float
) -> _Rollout:
    """The structure; args are deter_start to uniform, weights those of core and posterior."""
    core, posterior = CoreWeights(*weights[:10]), PosteriorWeights(*weights[10:])
    time, batch, size = args[2].shape
    classes = kept[1].shape[2]
    return _Rollout(
        time=time,
        batch=batch,
        deter=size,
        stoch=args[5].shape[-1],
        classes=classes,
        hidden=core.deter_bias.shape[0],
        blocks=core.own.shape[0],
        threads=torch.get_num_threads(),
        unimix=unimix,
        **dict(zip("deter_start stoch_start drive projected keep uniform".split(), args, strict=True)),
        **dict(zip(_CORE.split(), core, strict=True)),
        **dict(zip(_POSTERIOR.split(), posterior, strict=True)),
        **dict(zip(_KEPT.split(), kept, strict=True)),
    )


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.unimix = tensors[6]
        args = tuple(x.detach().contiguous() for x in tensors[:6])
        weights = tuple(x.detach().contiguous() for x in tensors[7:])
        time, batch, size = args[2].shape
        variables, units = args[5].shape[-1], weights[1].shape[0]
        classes = weights[-1].shape[0] // variables
        lead = (time, batch)
        widths = (size, (classes, variables), (classes, variables), (classes, variables), 2 * units, size)
        shapes = [(*lead, *(w if isinstance(w, tuple) else (w,))) for w in (*widths, 3 * size, units)]
        kept = tuple(torch.empty(shape) for shape in shapes)
        call(library().rollout_forward, _arguments(args, weights, kept, ctx.unimix))
        ctx.save_for_backward(*args, *weights, *kept)
        return kept[0], kept[1], kept[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        args, weights, kept = saved[:6], saved[6:20], saved[20:]
        core, posterior = CoreWeights(*weights[:10]), PosteriorWeights(*weights[10:])
        lead, z, units = kept[0].shape[:2], posterior.logits.shape[0], posterior.scale.shape[0]
        size = kept[0].shape[-1]
        widths = (z, units, 3 * size, size, 2 * units, size, z, units, size, 2 * units, units, size, 2 * units)
        rows = {name: torch.empty(*lead, w) for name, w in zip(_BY_ROW.split(), widths, strict=True)}
        out = tuple(torch.zeros_like(w) for w in weights)
        names = [field for field, _ in _RolloutGrads._fields_[-len(out) :]]
        by = dict(zip(("by_deter", "by_probs", "by_stoch"), (g.contiguous() for g in grads), strict=True))
        call(
            library().rollout_backward,
            _arguments(args, weights, kept, ctx.unimix),
            _RolloutGrads(**by, **rows, **dict(zip(names, out, strict=True))),
        )
        return (None, None, rows["pre_hidden"], rows["read"], None, None, None, *out)
