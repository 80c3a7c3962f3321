"""How many rows per second one actor collects, beside bare envpool with the same task, options and actions.

Three depths: `loop` is the environment loop with random actions, `actor` adds staging and acknowledged
appends to a replay shard over gRPC (the shard in a process of its own), `dreamer` the policy's forward pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.actor import Actor
from actors.envs.catalog import make_env
from actors.envs.envpool_door import load_envpool
from actors.loop import env_loop
from actors.random_policy import RandomPolicy
from bench.load import Row, Samples, repeat
from replay.client import GrpcReplayWriter
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import InfrastructureError
from system.interfaces import Policy
from system.params.memory import MemoryWeights
from system.seeds import generator
from system.specs import TableSpec
from system.weights import PolicyVersion, Weights

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cartpole": ("CartPole-v1", {}),
    "pong": ("Pong-v5", {"img_height": 64, "img_width": 64, "gray_scale": False, "stack_num": 1}),
}
ROOT = Path(__file__).resolve().parent.parent
SLICE_SECONDS = 0.5
CAPACITY_ROWS = 60_000
CHUNK_ROWS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="measure each figure for about so long")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """rows_rate of bare envpool and of our three depths over it."""
    cases = list(CASES) if options.case == "all" else [options.case]
    for case in cases:
        task, settings = CASES[case]
        bare = _bare(task, settings, options.envs, options.seconds)
        yield bare.row("collect", f"{case}-envpool", "rows_rate", "rows/s")
        for depth, measure in (("loop", _loop), ("actor", _actor), ("dreamer", _dreamer)):
            samples = measure(task, settings, options.envs, options.seconds)
            ratio = samples.median / bare.median
            yield samples.row(
                "collect", f"{case}-{depth}", "rows_rate", "rows/s", ratio=ratio, ratio_to="envpool"
            )


def _per_second(advance: Callable[[], int]) -> Callable[[], float]:
    """Rows per second over one slice, where advance() makes some rows and returns how many."""

    def measure() -> float:
        begun, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - begun) < SLICE_SECONDS:
            count += advance()
        return count / spent

    measure()  # warm up
    return measure


def _bare(task: str, settings: dict[str, Any], envs: int, seconds: float) -> Samples:
    spec = make_env(f"envpool:{task}", envs, options=settings).spec
    pool: Any = load_envpool().make(task, env_type="gymnasium", num_envs=envs, seed=0, **settings)
    rng = generator(0, "bench", "collect")
    pool.async_reset()

    def advance() -> int:
        *_, info = pool.recv()
        ids = info["env_id"]
        pool.send(spec.action.sample(rng, len(ids))[:, 0], ids)
        return len(ids)

    samples = repeat(_per_second(advance), seconds=seconds)
    pool.close()
    return samples


def _loop(task: str, settings: dict[str, Any], envs: int, seconds: float) -> Samples:
    env = make_env(f"envpool:{task}", envs, options=settings)
    env.start(0)
    steps = env_loop(env, RandomPolicy(env.spec.action, 0), "train")
    samples = repeat(_per_second(lambda: len(next(steps).step)), seconds=seconds)
    steps.close()
    env.close()
    return samples


def _actor(task: str, settings: dict[str, Any], envs: int, seconds: float) -> Samples:
    env = make_env(f"envpool:{task}", envs, options=settings)
    table = TableSpec.of(env.spec)
    return _collect(env, table, RandomPolicy(env.spec.action, 0), MemoryWeights(), seconds)


def _dreamer(task: str, settings: dict[str, Any], envs: int, seconds: float) -> Samples:
    from learner.catalog import make_agent, make_config, make_policy, overlay_columns

    env = make_env(f"envpool:{task}", envs, options=settings)
    config = make_config("dreamer", {"size": "nano"})
    weights = MemoryWeights()
    agent = make_agent("dreamer", config, env.spec, device="cpu", seed=0)
    weights.publish(Weights.of(PolicyVersion(1, 1), agent.weights()))
    table = TableSpec.of(env.spec, overlay_columns("dreamer", config, env.spec))
    return _collect(env, table, make_policy("dreamer", config, env.spec, seed=0), weights, seconds)


def _collect(env: Any, table: TableSpec, policy: Policy, weights: MemoryWeights, seconds: float) -> Samples:
    """Rows per second of one actor that appends to a shard in another process.

    It makes no new rows while sent ones are unacknowledged, so at most one chunk of them is not stored yet.
    """
    with _shard(table) as address:
        writer = GrpcReplayWriter(address, table)
        actor = Actor(0, 0, env, policy, writer, weights, table=table, seed=0, chunk_rows=CHUNK_ROWS)
        actor.run(SLICE_SECONDS)

        def measure() -> float:
            report = actor.run(SLICE_SECONDS)
            return report.rows / report.wall

        samples = repeat(measure, seconds=seconds)
        actor.close()
    return samples


def serve(root: str, table: str) -> None:
    """Child process: a replay shard that accepts everything until stdin closes."""
    shard = ReplayShard(Path(root), 0, TableSpec.from_json(json.loads(table)), capacity_rows=CAPACITY_ROWS)
    server = serve_shard(shard, "127.0.0.1:0")
    print(server.port, flush=True)
    sys.stdin.read()
    server.stop()
    shard.close()


@contextmanager
def _shard(table: TableSpec) -> Iterator[str]:
    program = "import sys; from bench.collect import serve; serve(sys.argv[1], sys.argv[2])"
    with tempfile.TemporaryDirectory(prefix="bench-collect-") as root:
        process = subprocess.Popen(
            [sys.executable, "-c", program, root, json.dumps(table.to_json())],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise InfrastructureError("the shard process ended at once; see its message above")
            yield f"127.0.0.1:{port}"
        finally:
            process.communicate("", timeout=60.0)
