"""Statistics over learner ranks: the one place where a batch quantity is averaged or gathered over processes.

Without a process group both are the identity. Both pass gradients, so a loss built on a gathered batch
has the gradient of the global loss (averaging per-rank statistics instead silently scales it).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_count() -> int:
    """Number of learner ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """Elementwise mean of `x` over ranks; every rank gets it."""
    return x if rank_count() == 1 else _Mean.apply(x)


def gather_over_ranks(x: Tensor) -> Tensor:
    """The `x` [R, ...] of all ranks, concatenated along axis 0 in rank order: [ranks * R, ...]."""
    return x if rank_count() == 1 else _Gather.apply(x)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        out = x.contiguous().clone()
        dist.all_reduce(out)
        return out.div_(rank_count())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        del ctx
        out = grads[0].contiguous().clone()
        dist.all_reduce(out)
        return out.div_(rank_count())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(rank_count())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        out = grads[0].contiguous().clone()
        dist.all_reduce(out)
        start = dist.get_rank() * ctx.rows
        return out[start : start + ctx.rows]
