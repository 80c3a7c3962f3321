"""Adapter `<module>:<callable>`: your own environment, whatever of the three kinds it is.

The callable returns a gymnasium Env (it is then called once per environment), a gymnasium VectorEnv, or
our VectorEnv. It gets the env options as keyword arguments, and num_envs if it has such a parameter.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
import gymnasium.vector
import gymnasium.wrappers

from actors.envs.checked import CheckedEnv
from actors.envs.faults import RestartBudget
from actors.envs.gym_catalog import vector_settings
from actors.envs.gym_envs import GUARDED, GymVectorEnv, vectorize
from actors.envs.options import EnvOptions
from system.errors import ConfigError, DreamfleetError
from system.interfaces import VectorEnv


def builder(
    module: str, attribute: str, num_envs: int, options: EnvOptions, budget: RestartBudget, timeout: float
) -> Callable[[], VectorEnv]:
    """What builds the environment behind `module:attribute`.

    Raises: ConfigError when it cannot be imported or called, or returns something else.
    """
    name = f"{module}:{attribute}"
    make = _load(name, module, attribute)
    return of_callable(name, make, num_envs, options, budget, timeout)


def of_callable(
    name: str,
    make: Callable[..., Any],
    num_envs: int,
    options: EnvOptions,
    budget: RestartBudget,
    timeout: float,
) -> Callable[[], VectorEnv]:
    """What builds the environment that `make` returns; see the module's note."""
    backend = dict(options.backend)
    vectorization, autoreset, context = vector_settings(backend)
    takes = _parameters(make)
    time_limit = options.time_limit
    if time_limit is not None and "time_limit" in takes:
        backend["time_limit"], time_limit = time_limit, None
    kwargs = backend | ({"num_envs": num_envs} if "num_envs" in takes else {})

    def build() -> VectorEnv:
        made = call(name, make, kwargs)
        if isinstance(made, gymnasium.Env) and not isinstance(made, gymnasium.vector.VectorEnv):
            made.close()
            single = partial(_single, name, make, kwargs, time_limit)
            vector = vectorize(
                name, single, num_envs, options,
                vectorization=vectorization, autoreset=autoreset, context=context,
            )  # fmt: skip
            return GymVectorEnv(name, vector, GUARDED, budget, timeout=timeout)
        if options.action_repeat > 1 or time_limit is not None:
            raise ConfigError(
                f"{name} is a vector environment: action_repeat and time_limit are its own business; "
                "take the env options out and do it inside"
            )
        if isinstance(made, gymnasium.vector.VectorEnv):
            return _sized(name, GymVectorEnv(name, made, options, budget, timeout=timeout), num_envs)
        if isinstance(made, VectorEnv):
            return _sized(name, CheckedEnv(made), num_envs)
        raise ConfigError(
            f"{name} returned {type(made).__name__}, must be a gymnasium Env, a gymnasium VectorEnv or "
            "dreamfleet's VectorEnv (spec, num_envs, start, send, recv, render, close)"
        )

    return build


def call(name: str, make: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the user's factory. Raises: ConfigError with what it raised."""
    try:
        return make(**kwargs)
    except DreamfleetError:
        raise
    except Exception as error:  # a stranger's code: all we can do is name it
        raise ConfigError(
            f"{name} called with {sorted(kwargs)} raised {error!r}; correct the env options or the callable"
        ) from error


def _single(
    name: str, make: Callable[..., Any], kwargs: Mapping[str, Any], time_limit: int | None
) -> gymnasium.Env[Any, Any]:
    env = call(name, make, kwargs)
    return env if time_limit is None else gymnasium.wrappers.TimeLimit(env, time_limit)


def _sized(name: str, env: VectorEnv, num_envs: int) -> VectorEnv:
    if env.num_envs != num_envs:
        raise ConfigError(
            f"{name} returned {env.num_envs} environments, asked for were {num_envs}; "
            "let the callable take num_envs"
        )
    return env


def _load(name: str, module: str, attribute: str) -> Callable[..., Any]:
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"environment {name!r} cannot be imported ({error}); write <module>:<callable> with a module on "
            "the Python path, or one of envpool:, gym:, dmc:, toy:"
        ) from error
    if not callable(found):
        raise ConfigError(f"environment {name!r} is a {type(found).__name__}, must be callable")
    return found


def _parameters(make: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(make).parameters)
    except (TypeError, ValueError):  # builtins without a signature
        return frozenset()
