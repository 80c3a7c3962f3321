"""Posterior rollout by the compiled library: same contract and same gradients as `learner.nn.bptt`.

Letters: T time, B batch, D deter, S variables, C classes, Z = C*S, U hidden units.
"""

from __future__ import annotations

import threading
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
    *("logits", "gates", "embedded", "before", "before_stoch"),
    *("read_active", "hidden_active", "inputs_active", "read_scale_rows", "scale_rows", "in_scale_rows"),
]
WEIGHT_GRADS = [
    *("deter_in", "deter_bias", "stoch_in", "stoch_bias", "in_scale", "own", "shared", "scale"),
    *("gates_weight", "gates_bias", "read_in", "read_scale", "logits_weight", "logits_bias"),
]
SPARE_SHAPES = 8
"""Sets of buffers kept for later calls."""


class _Rollout(Block):
    _fields_ = fields(
        "int:time int:batch int:deter int:stoch int:classes int:hidden int:blocks int:threads float:unimix",
        *INPUTS,
        *CORE,
        *POSTERIOR,
        *KEPT,
    )


class _RolloutGrads(Block):
    _fields_ = fields("", *BY, "read", "pre_hidden", *ROWS, *WEIGHT_GRADS)


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


class _Room:
    """What a call is done with serves the next of its shape: used memory costs less than new memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: dict[tuple[tuple[int, ...], ...], tuple[Tensor, ...]] = {}

    def take(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Uninitialised tensors, the caller's own until it gives them back."""
        with self._lock:
            spare = self._spare.pop(shapes, None)
        return spare if spare is not None else tuple(torch.empty(shape) for shape in shapes)

    def give_back(self, tensors: tuple[Tensor, ...]) -> None:
        with self._lock:
            while len(self._spare) >= SPARE_SHAPES:
                del self._spare[next(iter(self._spare))]
            self._spare[tuple(tuple(x.shape) for x in tensors)] = tensors


_room = _Room()


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.unimix = args[6]
        inputs = tuple(x.detach().contiguous() for x in args[:6])
        weights = tuple(x.detach().contiguous() for x in args[7:])
        time, batch, size = inputs[2].shape
        variables, units = inputs[5].shape[-1], inputs[3].shape[-1]
        stoch = (time, batch, weights[-1].shape[0] // variables, variables)
        out = tuple(torch.empty(shape) for shape in ((time, batch, size), stoch, stoch))
        wide = ((time, batch, width) for width in (2 * units, size, 3 * size, units))
        ctx.kept = _room.take(stoch, *wide)
        call(library().rollout_forward, _arguments(inputs, weights, (*out, *ctx.kept), ctx.unimix))
        ctx.save_for_backward(*inputs, *weights, *out)
        if not any(ctx.needs_input_grad):
            _room.give_back(ctx.kept)
            ctx.kept = None
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if ctx.kept is None:
            raise RuntimeError("the rollout keeps its activations for one backward pass only")
        saved, kept, ctx.kept = ctx.saved_tensors, ctx.kept, None
        inputs, weights, out = saved[:6], saved[6:-3], saved[-3:]
        time, batch, size = out[0].shape
        z, u, d = weights[-1].shape[0], kept[-1].shape[-1], size
        by_hidden, by_read = torch.empty(time, batch, d), torch.empty(time, batch, u)
        widths = (z, 3 * d, 2 * u, d, z, u, d, 2 * u, u, d, 2 * u)
        rows = _room.take(*((time, batch, width) for width in widths))
        by_weights = tuple(torch.zeros_like(w) for w in weights)
        call(
            library().rollout_backward,
            _arguments(inputs, weights, (*out, *kept), ctx.unimix),
            _RolloutGrads(
                **dict(zip(BY, (g.contiguous() for g in grads), strict=True)),
                **dict(zip(ROWS, rows, strict=True)),
                read=by_read,
                pre_hidden=by_hidden,
                **dict(zip(WEIGHT_GRADS, by_weights, strict=True)),
            ),
        )
        _room.give_back(kept)
        _room.give_back(rows)
        return None, None, by_hidden, by_read, None, None, None, *by_weights
