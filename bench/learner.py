"""How long one update of the DreamerV3 learner takes, and one acting step of its policy.

Equal work for every learner compared with: batch 16 x 64 plus one context row, horizon 15, all losses, fp32.
Needs neither ray nor envpool.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from bench.load import Row, repeat, timed
from learner.catalog import make_agent, make_config, make_policy
from learner.devices import resolve_device
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.latents import latent_columns
from system.experience import Sequence, SequenceIds, Step
from system.seeds import generator
from system.specs import ActionSpec, ArraySpec, EnvSpec, TableSpec

CASES = {
    "vector": EnvSpec(
        name="vector",
        obs={"state": ArraySpec(shape=(24,), dtype="float32")},
        action=ActionSpec(kind="continuous", size=6),
    ),
    "image": EnvSpec(
        name="image",
        obs={"image": ArraySpec(shape=(64, 64, 3), dtype="uint8", kind="image")},
        action=ActionSpec(kind="discrete", classes=(6,)),
    ),
}
SIZES = {"1m": "size1m", "nano": "nano", **{f"{n}m": f"size{n}m" for n in (12, 25, 50, 100, 200, 400)}}
EPISODE = 100
"""Rows per episode of the made-up experience."""
PEAK_SIDE = 1024
"""Side of the square matrices whose product is taken for the machine's peak."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--size", choices=list(SIZES), default="1m")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 or auto")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--backend",
        choices=["each", "auto", "torch", "native"],
        default="each",
        help="who computes the hot regions; each: torch, and native where it can be had",
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="measure each figure for about so long")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="other projects' learners too, where the work is equal: size 1m, 16 x 64, fp32, cpu",
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """update_ms, params, gflop and cpu_per_wall of each case and backend, then policy_ms of 1, 8, 16 envs."""
    torch.set_num_threads(options.threads)
    settings = {"size": SIZES[options.size], "dtype": options.dtype}
    configs = [make_config("dreamer", settings | {"backend": name}) for name in _backends(options)]
    cases = list(CASES) if options.case == "all" else [options.case]
    yield _peak_row(options)
    for case in cases:
        ours = math.inf
        for config in configs:
            for row in _update_rows(case, config, options):
                if row.metric == "update_ms":
                    ours = min(ours, row.value)
                yield row
        if options.peers and _equal_work(options):
            from bench.learner_peers import peer_rows

            yield from peer_rows(case, options.threads, options.seconds, ours)
    torch.set_num_threads(1)
    for case in cases:
        for count in (1, 8, 16):
            yield _policy_row(case, configs[0], count, options.seconds / 5)


def _backends(options: argparse.Namespace) -> list[str]:
    if options.backend != "each":
        return [options.backend]
    from learner.native.library import available

    plain = options.device == "cpu" and options.dtype == "fp32"
    return ["torch", "native"] if plain and available() else ["torch"]


def _equal_work(options: argparse.Namespace) -> bool:
    """Whether other projects' learners do the same amount: their sizes are fixed in `bench.peers`."""
    found = options.size, options.batch, options.length, options.dtype, options.device
    return found == ("1m", 16, 64, "fp32", "cpu")


def synthetic_sequence(env: EnvSpec, config: DreamerConfig, batch: int, length: int) -> Sequence:
    """Noise in the shape of a replay batch [B, 1 + T]: images that do not compress, episodes that end."""
    rng = generator(0, "bench", env.name)
    table = TableSpec.of(env, latent_columns(config))
    shape = (batch, 1 + length)
    columns = {name: _noise(rng, spec, shape, config) for name, spec in table.all.items()}
    columns["action"] = env.action.sample(rng, batch * (1 + length)).reshape(*shape, -1)
    step = (np.arange(1 + length) + rng.integers(0, EPISODE, size=(batch, 1))) % EPISODE  # [B, 1 + T]
    columns["is_first"], columns["is_last"] = step == 0, step == EPISODE - 1
    columns["is_terminal"] = columns["is_last"] & (rng.random((batch, 1)) < 0.5)
    zeros = np.zeros(batch, np.int32)
    ids = SequenceIds(shard=zeros, stream=zeros, start=np.zeros(batch, np.int64))
    return Sequence(columns=columns, ids=ids, context=1)


def _noise(
    rng: np.random.Generator, spec: ArraySpec, shape: tuple[int, ...], config: DreamerConfig
) -> NDArray[np.generic]:
    full = (*shape, *spec.shape)
    if spec.dtype == "float32":
        return rng.normal(size=full).astype(np.float32)
    if spec.dtype == "uint16":  # deter as bfloat16 bits
        return (np.tanh(rng.normal(size=full)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    high = 256 if spec.kind == "image" else config.classes
    return rng.integers(0, high, size=full).astype(spec.dtype)


def matmul_peak(device: str, dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """(GFLOP/s of the best of many square matrix products, foreign load meanwhile)."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> float:
        def product() -> None:
            torch.mm(a, b)
            if a.is_cuda:
                torch.cuda.synchronize()

        return timed(product)

    samples = repeat(multiply, seconds=seconds / 10, least=10)
    return 2 * PEAK_SIDE**3 / min(samples.values) / 1e9, samples.foreign_load


def _peak(options: argparse.Namespace) -> tuple[float, float]:
    kind = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    return matmul_peak(str(resolve_device(options.device)), kind, options.seconds)


def _peak_row(options: argparse.Namespace) -> Row:
    peak, foreign = _peak(options)
    return Row(
        bench="learner",
        case=f"machine-{options.dtype}",
        metric="matmul_peak",
        value=peak,
        unit="GFLOP/s",
        foreign_load=foreign,
    )


def update_gflop(env: EnvSpec, config: DreamerConfig, sequence: Sequence) -> float:
    """GFLOP of the products of one update as torch counts them: in one thread, outside our library."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    agent = make_agent("dreamer", config.model_copy(update={"backend": "torch"}), env, device="cpu", seed=0)
    with FlopCounterMode(display=False) as counter:
        agent.learn(sequence, agent.initial(sequence.shape[0]))
    torch.set_num_threads(threads)
    return counter.get_total_flops() / 1e9


def _update_rows(case: str, config: DreamerConfig, options: argparse.Namespace) -> Iterator[Row]:
    env = CASES[case]
    agent = make_agent("dreamer", config, env, device=options.device, seed=0)
    sequence = synthetic_sequence(env, config, options.batch, options.length)
    carry: Any = agent.initial(options.batch)
    gflop = update_gflop(env, config, sequence)
    for _ in range(3):  # buffers, caches, compiled parts
        agent.learn(sequence, carry)

    before, _ = _peak(options)
    samples = repeat(lambda: 1000 * timed(lambda: agent.learn(sequence, carry)), seconds=options.seconds)
    after, _ = _peak(options)
    share = gflop / (samples.median / 1000) / max(before, after)
    name = case if options.size == "1m" else f"{case}-{options.size}"
    name = f"{name} {agent.behavior.backend.name}"
    yield samples.row("learner", name, "update_ms", "ms", ratio=share, ratio_to="matmul_peak")
    yield samples.row("learner", name, "cpu_per_wall", "cores", value=samples.cpu_per_wall)
    yield Row(bench="learner", case=name, metric="gflop", value=gflop, unit="GFLOP")
    yield Row(bench="learner", case=name, metric="params", value=agent.parameter_count(), unit="parameters")


def _policy_row(case: str, config: DreamerConfig, count: int, seconds: float) -> Row:
    env = CASES[case]
    policy = make_policy("dreamer", config, env, seed=0)
    batch = synthetic_sequence(env, config, count, 1).columns
    step = Step(
        env_id=np.arange(count, dtype=np.int32),
        obs={name: np.ascontiguousarray(batch[name][:, 0]) for name in env.obs},
        reward=np.zeros(count, np.float32),
        is_first=np.zeros(count, np.bool_),
        is_last=np.zeros(count, np.bool_),
        is_terminal=np.zeros(count, np.bool_),
    )
    carry = policy.initial(count)
    for _ in range(20):
        policy.act(carry, step, "train")
    samples = repeat(
        lambda: 1000 * timed(lambda: policy.act(carry, step, "train")), seconds=seconds, least=50, most=5000
    )
    return samples.row("learner", f"{case}-n{count}", "policy_ms", "ms")
