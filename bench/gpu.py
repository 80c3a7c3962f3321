"""The learner on a GPU: time of an update in the steady state, share of it the card is busy, peak memory.

The whole path counts: batch up, captured update, metrics and latents down. `docs/gpu_checks.md` says what to
run and what to expect. On a CPU only the time is told, which checks the mechanics.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.learner import CASES, SIZES, synthetic_sequence
from bench.load import Row, repeat
from learner.catalog import make_agent, make_config

WARM_UPDATES = 20
BATCHES = 4
"""Different batches, used in turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=list(CASES), default="vector")
    parser.add_argument("--size", choices=list(SIZES), default="1m")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:0, or cpu to check the mechanics")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--updates", type=int, default=100, help="in each measurement")
    parser.add_argument("--seconds", type=float, default=20.0, help="measure for about so long")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="family settings")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """update_ms and cpu_per_wall; on CUDA also peak_memory, busy_share and launches."""
    chosen = {"size": SIZES[options.size], "dtype": options.dtype} | _settings(options.set)
    config, env = make_config("dreamer", chosen), CASES[options.case]
    agent: Any = make_agent("dreamer", config, env, device=options.device, seed=0)
    batches = [synthetic_sequence(env, config, options.batch, options.length) for _ in range(BATCHES)]
    cuda = agent.device.type == "cuda"
    case = f"{options.case}-{options.size}-{options.dtype}"

    def updates(count: int) -> None:
        for k in range(count):
            agent.learn(batches[k % BATCHES], {})
        if cuda:
            torch.cuda.synchronize()

    def milliseconds() -> float:
        begun = time.perf_counter()
        updates(options.updates)
        return 1000 * (time.perf_counter() - begun) / options.updates

    updates(min(WARM_UPDATES, options.updates))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    samples = repeat(milliseconds, seconds=options.seconds, least=3)
    yield samples.row("gpu", case, "update_ms", "ms")
    yield samples.row("gpu", case, "cpu_per_wall", "cores", value=samples.cpu_per_wall)
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        yield Row(bench="gpu", case=case, metric="peak_memory", value=peak, unit="GiB")
        yield from _traced(case, lambda: updates(options.updates), options.updates)


def _settings(assignments: list[str]) -> dict[str, Any]:
    from system.config import parse_assignment

    out: dict[str, Any] = {}
    for text in assignments:
        out |= parse_assignment(text)
    return out


def _traced(case: str, work: Callable[[], None], updates: int) -> Iterator[Row]:
    """What a trace of the card says: busy share of the wall time, and launches from the host per update."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        begun = time.perf_counter()
        work()
        wall = time.perf_counter() - begun
    events = trace.events() or []
    spans = [(e.time_range.start, e.time_range.end) for e in events if "CUDA" in str(e.device_type)]
    launches = sum(e.name in ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernelEx") for e in events)
    busy = union(spans) / 1e6 / wall
    yield Row(bench="gpu", case=case, metric="busy_share", value=busy, unit="of wall", n=updates)
    yield Row(bench="gpu", case=case, metric="launches", value=launches / updates, unit="per update")


def union(spans: list[tuple[float, float]]) -> float:
    """Length that intervals cover together: kernels on several streams overlap."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            covered += end - max(start, reached)
            reached = end
    return covered
