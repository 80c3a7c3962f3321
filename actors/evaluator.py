"""Plays whole episodes with a frozen policy and reports unbiased scores. Uses the same loop as the actor."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.loop import env_loop
from actors.random_policy import RandomPolicy
from system.errors import ConfigError
from system.interfaces import Mode, Policy, VectorEnv


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Made by evaluate. Entry i of both arrays is the same episode, ordered by env id, then time."""

    returns: NDArray[np.float64]  # [episodes], undiscounted
    lengths: NDArray[np.int64]  # [episodes], in rows without the first
    mean: float
    std: float
    wall: float  # seconds
    complete: bool  # False when max_seconds came first: what is there then leans towards short episodes


def evaluate(
    env: VectorEnv,
    policy: Policy,
    episodes: int,
    seed: int,
    mode: Mode = "eval",
    max_seconds: float = 600.0,
) -> EvalReport:
    """Start `env` with `seed` and play `episodes` episodes.

    Each environment plays a fixed quota, decided beforehand: taking the first `episodes` to finish
    would favour short ones. Raises: ConfigError for episodes < 1; whatever the environment raises.
    """
    if episodes < 1:
        raise ConfigError(f"evaluation episodes ({episodes}) must be >= 1")
    begin = time.monotonic()
    quota = np.full(env.num_envs, episodes // env.num_envs)  # [N]
    quota[: episodes % env.num_envs] += 1
    finished: list[list[tuple[float, int]]] = [[] for _ in range(env.num_envs)]
    missing = episodes
    env.start(seed)
    for rows in env_loop(env, policy, mode, timeout=max_seconds):
        for episode in rows.episodes:
            if len(finished[episode.env_id]) < quota[episode.env_id]:
                finished[episode.env_id].append((episode.score, episode.length))
                missing -= 1
        if not missing or time.monotonic() - begin > max_seconds:
            break
    flat = [entry for entries in finished for entry in entries]
    returns = np.array([score for score, _ in flat], np.float64)
    return EvalReport(
        returns=returns,
        lengths=np.array([length for _, length in flat], np.int64),
        mean=float(returns.mean()) if len(returns) else float("nan"),
        std=float(returns.std()) if len(returns) else float("nan"),
        wall=time.monotonic() - begin,
        complete=not missing,
    )


def random_baseline(env: VectorEnv, episodes: int, seed: int, max_seconds: float = 600.0) -> EvalReport:
    """What uniform random actions score, from the same seed a policy is evaluated with."""
    return evaluate(env, RandomPolicy(env.spec.action, seed), episodes, seed, "eval", max_seconds)
