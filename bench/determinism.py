"""Do two runs with one seed go the same way, bit for bit? The whole exact mode: replay, agent, learn loop.

Each run is a process of its own, so that neither hash seeds nor memory layout are shared. After every update
the digests of weights, optimiser, slow critic, return range, random state and reported losses are compared.
`python -m bench.determinism` is one such run: it prints one digest per update.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.learner import CASES, SIZES
from bench.load import Load, Row
from learner.batches import Batches
from learner.catalog import make_agent, make_config, overlay_columns
from learner.checkpoint import CheckpointStore
from learner.families.dreamer.config import DreamerConfig
from learner.loop import learn_loop
from learner.publish import Publisher
from replay.limiter import RateLimiter
from replay.memory import MemoryReplay
from replay.synthetic import rows as synthetic_rows
from system.errors import InfrastructureError, IntegrityError
from system.experience import StreamId
from system.params.memory import MemoryWeights
from system.specs import EnvSpec, TableSpec

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH, STORED_ROWS = 8, 32, 2000
LONGEST_SECONDS = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=list(CASES), default="vector")
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 or auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--settings", default="{}", help='settings of the family as JSON, such as \'{"compile": "auto"}\''
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """identical_updates: how many updates all runs agree on, of those asked for.

    Raises: IntegrityError naming the update and what differs first; InfrastructureError when a run fails.
    """
    with Load() as load:
        runs = [_run(options) for _ in range(options.runs)]
    agreed, differing = compare(runs)
    yield Row(
        bench="determinism",
        case=f"{options.case}-{options.size}",
        metric="identical_updates",
        value=agreed,
        unit="updates",
        ratio=agreed / options.updates,
        ratio_to="asked",
        n=options.runs,
        foreign_load=load.foreign,
    )
    if differing:
        raise IntegrityError(
            f"runs with seed {options.seed} must be equal and differ in {differing} after update "
            f"{agreed + 1}; look for sums whose order is not fixed"
        )


def compare(runs: list[list[dict[str, str]]]) -> tuple[int, list[str]]:
    """(updates before the first difference, the parts that differ there)."""
    for update, digests in enumerate(zip(*runs, strict=True)):
        if wrong := [part for part in digests[0] if len({digest[part] for digest in digests}) > 1]:
            return update, wrong
    return len(runs[0]), []


def trace(
    config: DreamerConfig, env: EnvSpec, *, updates: int, seed: int, device: str, root: Path
) -> Iterator[dict[str, str]]:
    """Digest of every part of the learner after each update of an exact run; `root` takes checkpoints."""
    table = TableSpec.of(env, overlay_columns("dreamer", config, env))
    limiter = RateLimiter(train_ratio=1e6, prefill_rows=100, tolerance_rows=1 << 30, min_rows=LENGTH + 1)
    replay = MemoryReplay(
        table,
        capacity_rows=2 * STORED_ROWS,
        batch=BATCH,
        length=LENGTH,
        context=1,
        seed=seed,
        limiter=limiter,
    )
    chunk = synthetic_rows(table, StreamId(actor=0, env=0), 0, STORED_ROWS)
    for name in overlay_columns("dreamer", config, env):
        chunk.columns[name][:] = 0  # type: ignore[index]
    replay.append([chunk], 10.0)
    agent = make_agent("dreamer", config, env, device=device, seed=seed)
    publisher = Publisher(agent, MemoryWeights(), every_updates=updates)
    ticks = learn_loop(
        agent,
        Batches(replay, 0, 10.0),
        publisher,
        CheckpointStore(root, keep=1),
        signature={"family": "dreamer"},
        checkpoint_seconds=1e9,
        total_updates=updates,
    )
    for tick in ticks:
        yield {"losses": _digest(dict(tick.metrics)), **{k: _digest(v) for k, v in agent.state().items()}}


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            found.update(key.encode())
            _feed(found, value[key])
    elif isinstance(value, np.ndarray):
        found.update(np.ascontiguousarray(value).tobytes())
    else:
        found.update(repr(value).encode())


def _run(options: argparse.Namespace) -> list[dict[str, str]]:
    """One run in a process of its own. Raises: InfrastructureError."""
    names = ("case", "size", "updates", "seed", "device", "threads", "settings")
    chosen = [f"--{name}={getattr(options, name)}" for name in names]
    command = [sys.executable, "-m", "bench.determinism", *chosen]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(
            f"a run took longer than {LONGEST_SECONDS:g} s; ask for fewer updates"
        ) from error
    if done.returncode != 0:
        raise InfrastructureError(f"a run ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if len(found) != options.updates:
        raise InfrastructureError(f"a run made {len(found)} updates, must make {options.updates}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = make_config("dreamer", {"size": SIZES[options.size], **json.loads(options.settings)})
    with tempfile.TemporaryDirectory() as root:
        for digests in trace(
            config,
            CASES[options.case],
            updates=options.updates,
            seed=options.seed,
            device=options.device,
            root=Path(root),
        ):
            print(json.dumps(digests), flush=True)


if __name__ == "__main__":
    main()
