"""Judge a trained policy: load the newest checkpoint that verifies, play greedy episodes, and play a
uniform random policy beside it. Used by `dreamfleet eval` and at the end of `dreamfleet train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from deploy import assemble
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from system.errors import ConfigError, DeadlineError, IntegrityError
from system.interfaces import Mode, Policy
from system.seeds import child_seed
from system.specs import EnvSpec
from system.weights import PolicyVersion, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Returns of the policy and, beside them, of a random one."""

    returns: list[float]
    lengths: list[int]
    mean: float
    std: float
    random_mean: float
    random_std: float
    env_steps: int  # rows inserted when the evaluated weights were saved
    updates: int
    complete: bool = True  # False: time ran out, and what had ended by then leans towards short episodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a finished run leaves in summary.json."""

    run_dir: str
    env_steps: int
    updates: int
    seconds: float
    evaluation_return: float
    evaluation_std: float
    evaluation_episodes: int
    random_return: float
    finished_at: float
    curve: str
    video: list[str] = field(default_factory=list[str])
    alarms: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # health; those still on first

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_run(path: Path) -> tuple[RunConfig, EnvSpec]:
    """Config and environment spec of a run directory. Raises: ConfigError when it is none."""
    run_dir = RunDirectory(path)
    try:
        config = RunConfig.model_validate(run_dir.config())
    except ValidationError as error:
        raise IntegrityError(
            f"{run_dir.config_file} is not what train wrote ({error.errors()[0]['msg']}); "
            "restore it from a copy"
        ) from error
    return config, run_dir.env_spec()


def load_agent(path: Path) -> tuple[RunConfig, EnvSpec, Any, Mapping[str, Any]]:
    """The agent of a run as its newest good checkpoint left it, on the CPU.

    Raises: ConfigError without a checkpoint or for another model; IntegrityError for a broken one.
    """
    from deploy.learner_role import signature
    from learner.checkpoint import CheckpointStore, check_signature

    config, env_spec = open_run(path)
    store = CheckpointStore(RunDirectory(path).checkpoints, keep=config.learner.keep_checkpoints)
    loaded = store.newest_sound()
    if loaded is None:
        raise ConfigError(f"{path} has no checkpoint yet; train longer or restore checkpoints/ from a copy")
    check_signature(signature(config, env_spec), loaded.meta["signature"])
    cpu = config.model_copy(update={"learner": config.learner.model_copy(update={"device": "cpu"})})
    agent = assemble.agent(cpu, env_spec)
    agent.load(loaded.state["agent"])
    return config, env_spec, agent, loaded.state


def load_policy(path: Path) -> tuple[RunConfig, EnvSpec, Policy, Mapping[str, Any]]:
    """The acting policy of a run with its newest weights."""
    config, env_spec, agent, state = load_agent(path)
    policy = assemble.policy(config, env_spec, "evaluation")
    policy.load(Weights.of(PolicyVersion(1, 1), agent.weights()))
    return config, env_spec, policy, state


def evaluate_run(path: Path, episodes: int, *, seed: int | None = None, mode: Mode = "eval") -> Evaluation:
    """Play `episodes` with the run's policy and as many with a random one, on fresh seeds."""
    from actors.envs.catalog import make_env
    from actors.evaluator import evaluate
    from actors.random_policy import RandomPolicy

    config, env_spec, policy, state = load_policy(path)
    seed = child_seed(config.seed if seed is None else seed, "evaluation")
    width = min(config.evaluation.envs, episodes)

    def play(policy: Policy) -> Any:
        env = make_env(config.env.name, width, options=config.env.options, timeout=config.env.timeout_seconds)
        try:
            return evaluate(env, policy, episodes, seed, mode=mode, max_seconds=config.evaluation.max_seconds)
        finally:
            env.close()

    report, chance = play(policy), play(RandomPolicy(env_spec.action, seed, {}))
    if not len(report.returns) or not len(chance.returns):
        raise DeadlineError(
            f"no episode of {config.env.name} ended within evaluation.max_seconds "
            f"({config.evaluation.max_seconds:g}); raise it, or set env.options.time_limit"
        )
    return Evaluation(
        returns=[float(r) for r in report.returns],
        lengths=[int(n) for n in report.lengths],
        mean=float(np.mean(report.returns)),
        std=float(np.std(report.returns)),
        random_mean=float(np.mean(chance.returns)),
        random_std=float(np.std(chance.returns)),
        env_steps=int(state["reader"]["limiter"]["inserted"]),
        updates=int(state["progress"]["updates"]),
        complete=report.complete,
    )
