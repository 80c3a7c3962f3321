"""Does a trained world model know CartPole? Useful horizon, counterfactuals and plans, in one process.

The nano agent trains offline on rows of the real environment (random and half-decent play), and is judged on
rows of other seeds beside an untrained one and the true simulator, the ceiling. Minutes per seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.load import Load, Row
from learner.catalog import make_agent, make_config, overlay_columns
from learner.evaluation.compounding import Curve, compounding, predict
from learner.evaluation.harness import WorldModelReport, evaluate_model
from learner.evaluation.oracle import OracleModel
from learner.evaluation.rows import rows_of
from learner.evaluation.simulators import simulator_of
from learner.families.dreamer.agent import DreamerAgent
from learner.interfaces import ImaginedPolicy
from replay.limiter import RateLimiter
from replay.memory import MemoryReplay
from system.experience import Sequence, Step
from system.interfaces import Mode
from system.seeds import child_seed, generator
from system.specs import ArraySpec, EnvSpec, TableSpec
from system.weights import NO_VERSION, Weights

ENV = "gym:CartPole-v1"
ENVS, HORIZON, SEQUENCES = 16, 50, 64
BATCH, LENGTH, CONTEXT = 16, 32, 1
SEEN, COLD = LENGTH, 10
"""Rows seen before predicting. Judged rows come without latents, so the filter starts from nothing, which no
training sequence does: it has settled after as many rows as those have. After COLD rows it has not."""
CASES = ("trained", "untrained", "oracle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to train on")
    parser.add_argument("--updates", type=int, default=3_000, help="the recipe cartpole makes as many")
    parser.add_argument("--threads", type=int, default=1)


class Balancer:
    """Pushes towards the side the pole falls to; environment i of N plays a share i / (N - 1) at random."""

    def __init__(self, columns: Mapping[str, ArraySpec], envs: int, seed: int) -> None:
        self.columns, self.version = columns, NO_VERSION
        self._chance = np.linspace(0.0, 1.0, envs)  # [N]
        self._rng = generator(seed, "balancer")

    def initial(self, num_envs: int) -> None:
        """Nothing is carried."""

    def act(
        self, carry: None, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], None, dict[str, NDArray[np.generic]]]:
        (obs,) = step.obs.values()  # [n, 4]
        leaning = obs @ np.array([0.05, 0.1, 1.0, 0.3])
        chance = self._rng.random(len(step)) < self._chance[step.env_id]
        action = np.where(chance, self._rng.integers(0, 2, len(step)), leaning > 0).astype(np.int32)
        extras = {name: np.zeros((len(step), *spec.shape), spec.dtype) for name, spec in self.columns.items()}
        return action[:, None], None, extras

    def load(self, weights: Weights) -> None:
        """There is nothing to load."""


def collect(
    rows: int, seed: int, settings: Mapping[str, Any], batch: int, length: int
) -> tuple[EnvSpec, MemoryReplay]:
    """`rows` rows of the real environment in a replay that hands out batches of that shape."""
    from actors.envs.catalog import make_env
    from actors.loop import env_loop
    from actors.staging import Staging

    env = make_env(ENV, ENVS)
    try:
        table = TableSpec.of(env.spec, overlay_columns("dreamer", make_config("dreamer", settings), env.spec))
        replay = MemoryReplay(
            table,
            capacity_rows=2 * rows + 64 * ENVS,
            batch=batch,
            length=length,
            context=CONTEXT,
            seed=child_seed(seed, "sampler"),
            limiter=RateLimiter(1e6, prefill_rows=0, tolerance_rows=1 << 40, min_rows=1),
        )
        staging = Staging(0, 0, ENVS, table, table.overlay, chunk_rows=64)
        env.start(seed)
        for made in env_loop(env, Balancer(table.overlay, ENVS, seed), "train"):
            staging.add(made)
            if staging.full or replay.limiter.inserted + staging.rows >= rows:
                replay.append(staging.flush(), timeout=10.0)
            if replay.limiter.inserted + ENVS >= rows:
                return env.spec, replay
    finally:
        env.close()
    raise AssertionError("an environment loop never ends")


def greedy(agent: DreamerAgent) -> ImaginedPolicy:
    """The agent's most probable action in imagination."""
    nothing = torch.empty(0)
    return lambda state, h: agent.behavior.act(state["feat"], nothing, "eval")


def judge(agent: DreamerAgent, spec: EnvSpec, sequence: Sequence, seed: int) -> dict[str, WorldModelReport]:
    """Reports of the agent's model and of the simulator on the same rows."""
    simulator = simulator_of(ENV, spec)
    assert simulator is not None, spec
    oracle = OracleModel(simulator)
    rows = rows_of(agent, sequence, SEEN)
    told = evaluate_model(agent.model, rows, seed=seed, reference=oracle, policy=greedy(agent))
    truth = evaluate_model(oracle, rows.starting(oracle.initial(rows.sequences)), seed=seed, reference=oracle)
    return {"model": told, "oracle": truth}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One seed. Made by `trial`, taken by `rows` and `prove`."""

    seed: int
    reports: dict[str, WorldModelReport]  # of CASES, on rows of another seed
    cold_horizon: int  # useful horizon of the trained model after COLD rows, from no state at all
    seconds: float  # of training


def trial(seed: int, options: argparse.Namespace) -> Trial:
    """Train on real rows and judge on others."""
    settings = {"size": "nano"}
    config = make_config("dreamer", settings)
    spec, replay = collect(options.rows, child_seed(seed, "rows"), settings, BATCH, LENGTH)
    _, others = collect(options.rows // 4, child_seed(seed, "judged"), settings, SEQUENCES, SEEN + HORIZON)
    sequence = others.sample(10.0)
    agent = make_agent("dreamer", config, spec, device="cpu", seed=child_seed(seed, "agent"))
    untrained = judge(agent, spec, sequence, seed)
    begun = time.perf_counter()
    carry: Any = agent.initial(BATCH)
    for _ in range(options.updates):
        carry, _metrics, write_back = agent.learn(replay.sample(10.0), carry)
        if write_back is not None:
            replay.write_back(write_back)
    taken = time.perf_counter() - begun
    trained = judge(agent, spec, sequence, seed)
    cold = predict(agent.model, rows_of(agent, sequence, COLD), torch.Generator().manual_seed(seed))
    return Trial(
        seed=seed,
        reports={
            "trained": trained["model"], "untrained": untrained["model"], "oracle": trained["oracle"]
        },
        cold_horizon=compounding(agent.model, cold)["obs"].useful_horizon,
        seconds=taken,
    )  # fmt: skip


def _alike(report: WorldModelReport) -> Curve:
    """The curve in which every entry counts alike."""
    return next(curve for key, curve in report.curves.items() if key.endswith("/each"))


def figures(report: WorldModelReport) -> dict[str, tuple[float, str, float | None]]:
    """Metric -> (value, unit, the same of copying the last row)."""
    curve = report.main
    found: dict[str, tuple[float, str, float | None]] = {
        "useful_horizon": (float(curve.useful_horizon), "steps", None),
        "useful_horizon_each": (float(_alike(report).useful_horizon), "steps", None),
        "better_than_mean": (float(curve.better_than_mean), "steps", None),
        "one_step_error": (float(curve.one_step.mean()), "std", float(curve.one_step_copy.mean())),
        "filtered_error": (float(curve.filtered.mean()), "std", None),
        "action_shuffle": (
            report.shuffle[next(k for k in report.shuffle if k.startswith("obs/"))],
            "x",
            None,
        ),
    }
    for k in (1, 5, 15, 30, 50):
        if k <= curve.counted:
            found[f"error_{k}"] = (float(curve.model[k - 1]), "std", float(curve.copy[k - 1]))
    if report.counterfactual:
        found["counterfactual"] = (report.counterfactual.retrieval, "share", None)
        found["future_spread"] = (report.counterfactual.spread, "x", None)
    if report.plan:
        found["plan_gap"] = (report.plan.gap, "reward", None)
    return found


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Medians over the seeds, of a trained model, an untrained one and the simulator; ratio to copying."""
    with Load() as load:
        trials = list(_trials(options))
    for case in CASES:
        told = [figures(one.reports[case]) for one in trials]
        for metric, (_, unit, _) in told[0].items():
            values = [one[metric][0] for one in told if metric in one]
            ratios = [one[metric][0] / copy for one in told if metric in one and (copy := one[metric][2])]
            row = _row(case, metric, unit, values, load)
            yield replace(row, ratio=statistics.median(ratios), ratio_to="copy_last") if ratios else row
        yield _row(case, "passed", "share", [float(one.reports[case].passed) for one in trials], load, fmean)
    yield _row(
        "trained", f"useful_horizon_seen_{COLD}", "steps", [float(t.cold_horizon) for t in trials], load
    )
    yield _row("trained", "train_seconds", "s", [one.seconds for one in trials], load)


def _row(
    case: str, metric: str, unit: str, values: list[float], load: Load,
    middle: Callable[[list[float]], float] = statistics.median,
) -> Row:  # fmt: skip
    """One figure of all seeds; spread: from the least to the largest, over the middle one."""
    value = middle(values)
    return Row(
        bench="world_model", case=case, metric=metric, value=value, unit=unit, n=len(values),
        spread=(max(values) - min(values)) / abs(value) if value else 0.0, foreign_load=load.foreign,
    )  # fmt: skip


def _trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Each seed, told on stderr as it comes."""
    torch.set_num_threads(options.threads)
    for seed in map(int, options.seeds.split(",")):
        one = trial(seed, options)
        for case, report in one.reports.items():
            print(f"seed {seed} {case}: {report.text()}", file=sys.stderr, flush=True)
        yield one


def prove(arguments: list[str]) -> int:
    """Print a JSON line per seed; the number of seeds that prove nothing.

    A seed proves the harness when the trained model and the simulator pass all checks, and the untrained
    model, sound as it is, fails every one that only a trained model passes.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.proof worldmodel", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    failed = 0
    for one in _trials(options):
        untrained = one.reports["untrained"]
        fooled = [c.name for c in untrained.checks if c.name in untrained.scores and c.passed]
        passed = all(one.reports[case].passed for case in ("trained", "oracle"))
        passed = passed and untrained.sound and not fooled
        failed += not passed
        told = {case: {k: v[0] for k, v in figures(report).items()} for case, report in one.reports.items()}
        line = {"case": "worldmodel", "seed": one.seed, "passed": passed, "train_seconds": one.seconds}
        print(json.dumps(line | {f"horizon_seen_{COLD}": one.cold_horizon} | told), flush=True)
    return failed
