"""Work cut by rows: independent lanes, each a thread's whole task with single-threaded operations.

Cutting rows once, and not every operation again, keeps a lane's data in one core's cache and has nothing to
wait for until the end. torch releases the interpreter lock inside operations, so threads are enough.
Which rows a lane has depends on shapes alone, never on the number of threads: the same bits on any host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

SHARED = 32768
"""Elements from which torch itself shares an elementwise operation."""
Part = TypeVar("Part")
Result = TypeVar("Result")


def cut(rows: int, size: int, least: int = 1) -> list[slice]:
    """[0, rows) in equal slices of at most `size` rows; at least `least` slices if there are as many rows."""
    count = min(rows, max(least, -(-rows // size)))
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def run_lanes(lane: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`lane` of every part, in their order; on as many threads as torch uses. Gradients are not recorded."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        with torch.no_grad():
            return [lane(part) for part in parts]
    total = torch.get_num_threads()
    results: list[Result | None] = [None] * len(parts)

    def work(first: int) -> None:
        torch.set_num_threads(1)  # of this thread; cheap when it is already
        with torch.no_grad():
            for index in range(first, len(parts), threads):
                results[index] = lane(parts[index])

    others = [_pool(threads - 1).submit(work, first) for first in range(1, threads)]
    try:
        work(0)
    finally:
        wait(others)  # they compute, and write where the caller will: nothing ends them early
        torch.set_num_threads(total)
    for other in others:
        other.result()  # its exception, if it had one
    return results  # type: ignore[return-value]


@contextmanager
def alone(rows: Tensor) -> Iterator[None]:
    """Without torch's threads while operations are on tensors like `rows`, if those are too small to share.

    Sharing a small operation costs more than it saves, most of all where others want the processors.
    """
    total = torch.get_num_threads()
    if total == 1 or rows.is_cuda or rows.numel() >= SHARED:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(total)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for the life of the process: idle threads cost nothing."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")
