"""Finds an environment by name and builds it behind our contract. The front door of `actors.envs`.

Names: envpool:<Task>, gym:<id>, dmc:<domain_task> (an envpool task), toy:<name>, and
<module>:<callable> for anything of your own. Backends are imported only when named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from actors.envs.faults import RestartBudget
from actors.envs.options import EnvOptions
from actors.envs.wrappers import ContainedEnv
from system.errors import ConfigError
from system.interfaces import VectorEnv

Builder = Callable[[], VectorEnv]


def make_env(
    name: str, num_envs: int, *, options: Mapping[str, Any] | None = None, timeout: float = 60.0
) -> ContainedEnv:
    """Build `num_envs` environments of `name`; call start(seed) to begin.

    Options every backend honours: action_repeat, drop_obs, as_vector, frame, time_limit, max_restarts,
    restart_window (see EnvOptions); the rest goes to the backend. `timeout` (seconds) bounds building
    and resetting. The result belongs to this process: build it after any fork, not before.
    Raises: ConfigError for an unknown name or option; PreflightError when the machine lacks something.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs ({num_envs}) must be >= 1")
    split = EnvOptions.of(options or {})
    budget = RestartBudget(name, max_restarts=split.max_restarts, window_seconds=split.restart_window)
    build = _builder(name, num_envs, split, budget, timeout)
    return ContainedEnv(build, budget)


def _builder(name: str, num_envs: int, options: EnvOptions, budget: RestartBudget, timeout: float) -> Builder:
    prefix, colon, rest = name.partition(":")
    if not colon or not prefix or not rest:
        raise ConfigError(_without_prefix(name))
    if prefix in ("envpool", "dmc"):
        from actors.envs import envpool_door, envpool_envs

        task = envpool_door.dmc_task(rest) if prefix == "dmc" else rest
        return lambda: envpool_envs.EnvpoolVectorEnv(task, num_envs, options=options, timeout=timeout)
    if prefix == "gym":
        from actors.envs import gym_catalog

        return gym_catalog.builder(rest, num_envs, options, budget, timeout)
    if prefix == "toy":
        from actors.envs import toy

        return toy.builder(rest, num_envs, options)
    from actors.envs import external

    return external.builder(prefix, rest, num_envs, options, budget, timeout)


def _without_prefix(name: str) -> str:
    return (
        f"environment {name!r} must be written envpool:<Task>, gym:<id>, dmc:<domain_task>, toy:<name> or "
        f"<module>:<callable>; perhaps you mean envpool:{name.strip(':')} or gym:{name.strip(':')}"
    )
