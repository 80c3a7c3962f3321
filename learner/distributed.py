"""The door to torch.distributed: the group of learner ranks, and statistics over their batches.

Means and gathers are the identity without a group. Both pass gradients, so a loss built on a gathered batch
has the gradient of the global loss (averaging per-rank statistics instead silently scales it). Every
collective has a deadline and counts itself: who has entered fewest is the one the others wait for.
Neighbours: `learner.ranks`, which forms the group and names who is lost.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from system.errors import InfrastructureError

WARM_SECONDS = 600.0
"""Patience with the first updates, in which ranks compile and build, one after the other if need be."""
SLICE_SECONDS = 0.2
"""A wait on the CPU looks this often whether a rank is known to be lost."""


class CollectiveError(InfrastructureError):
    """A collective broke off or took too long. It cannot tell whose fault that is; `learner.ranks` can."""


def nobody_lost() -> bool:
    return False


@dataclass(slots=True, kw_only=True)
class Watch:
    """What this process has lived through in collectives, and how long it is patient."""

    entered: int = 0
    waited: float = 0.0  # seconds inside collectives; on a GPU only those of starting them
    patience: float = WARM_SECONDS
    lost: Callable[[], bool] = nobody_lost  # true once a rank is known to be gone


watch = Watch()
"""One per process, as the default process group."""


def rank_count() -> int:
    """Number of learner ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """Elementwise mean of `x` [...] over ranks; every rank gets it."""
    return x if rank_count() == 1 else _Mean.apply(x)


def average_(x: Tensor) -> Tensor:
    """Replace `x` [...] by its mean over ranks, in place and without gradient."""
    return x if rank_count() == 1 else _sum_(x).div_(rank_count())


def gather_over_ranks(x: Tensor) -> Tensor:
    """The `x` [R, ...] of all ranks, concatenated along axis 0 in rank order: [ranks * R, ...]."""
    return x if rank_count() == 1 else _Gather.apply(x)


def own_rows(x: Tensor) -> Tensor:
    """This rank's part [R, ...] of `x` [ranks * R, ...], which every rank made alike."""
    ranks = rank_count()
    if ranks == 1:
        return x
    assert x.shape[0] % ranks == 0, (x.shape, ranks)
    return x.chunk(ranks)[dist.get_rank()]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return average_(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        del ctx
        return average_(grads[0].contiguous().clone())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(rank_count())]
        mine = x.contiguous()
        _finish(lambda: dist.all_gather(parts, mine, async_op=True), mine.is_cuda)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        out = _sum_(grads[0].contiguous().clone())
        start = dist.get_rank() * ctx.rows
        return out[start : start + ctx.rows]


def _sum_(x: Tensor) -> Tensor:
    _finish(lambda: dist.all_reduce(x, async_op=True), x.is_cuda)
    return x


def _finish(start: Callable[[], Any], on_gpu: bool) -> None:
    """Start a collective and see it done. Raises: CollectiveError.

    On a GPU it is only enqueued: there NCCL's own watchdog ends the process, or the group is aborted.
    """
    watch.entered += 1
    begun = time.monotonic()
    try:
        work = start()
        if on_gpu:
            work.wait()
        else:
            _wait(work, begun + watch.patience)
    except RuntimeError as error:
        raise CollectiveError(
            f"collective {watch.entered} of the learner ranks did not finish ({str(error).splitlines()[0]})"
        ) from error
    finally:
        watch.waited += time.monotonic() - begun


def _wait(work: Any, deadline: float) -> None:
    """Raises: RuntimeError when the work fails, is not done in time, or a rank is known to be lost."""
    while True:
        try:
            work.wait(timedelta(seconds=SLICE_SECONDS))
            return
        except RuntimeError:
            if work.is_completed() or watch.lost() or time.monotonic() > deadline:
                raise


# ---- the group ------------------------------------------------------------------------------------


def join_group(
    rank: int, ranks: int, device: torch.device, host: str, store: socket.socket | int, seconds: float
) -> None:
    """Form the default process group: gloo on CPUs, NCCL on GPUs.

    `store`: rank 0's listening socket, the port of it for the others. Raises: CollectiveError.
    """
    timeout = timedelta(seconds=seconds)
    options: dict[str, Any] = {"world_size": ranks, "timeout": timeout, "wait_for_workers": False}
    if isinstance(store, int):
        port = store
    else:
        port = store.getsockname()[1]
        options |= {"is_master": True, "master_listen_fd": store.detach()}
    if host.startswith("127."):  # or gloo listens on whatever address the host's name has
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.TCPStore(host, port, **options),  # type: ignore[attr-defined]
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=WARM_SECONDS),
        )
    except RuntimeError as error:
        raise CollectiveError(
            f"learner rank {rank} cannot form a group of {ranks} ({str(error).splitlines()[0]})"
        ) from error


def set_patience(seconds: float) -> None:
    """Longest time that one collective may take from now on."""
    changed = max(seconds, watch.patience) > 2.0 * min(seconds, watch.patience)
    watch.patience = seconds
    if changed and rank_count() > 1 and dist.get_backend() == "nccl":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def break_group() -> None:
    """Let collectives on the GPU that wait for a lost rank end; their results are worthless."""
    if rank_count() > 1 and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


def leave_group() -> None:
    """Undo join_group."""
    if dist.is_initialized():
        dist.destroy_process_group()
