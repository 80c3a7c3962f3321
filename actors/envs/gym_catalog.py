"""Finds `gym:<id>` in gymnasium's registry and builds it. Between `catalog` and `gym_envs`."""

from __future__ import annotations

import difflib
import importlib
import multiprocessing
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

from actors.envs.faults import RestartBudget
from actors.envs.gym_envs import GUARDED, GymVectorEnv, Vectorization, vectorize
from actors.envs.options import EnvOptions
from system.errors import ConfigError

DEFAULT_CONTEXT = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def vector_settings(backend: dict[str, Any]) -> tuple[Vectorization, AutoresetMode, str]:
    """Take the options vectorization, autoreset and context out of `backend`."""
    vectorization = backend.pop("vectorization", "sync")
    autoreset = str(backend.pop("autoreset", "next_step")).upper()
    context = backend.pop(
        "context", "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if vectorization not in ("sync", "async"):
        raise ConfigError(f"env option vectorization ({vectorization!r}) must be sync, async or native")
    if autoreset not in AutoresetMode.__members__:
        raise ConfigError(
            f"env option autoreset ({autoreset.lower()!r}) must be next_step, same_step, disabled"
        )
    if context not in ("forkserver", "spawn"):
        raise ConfigError(f"env option context ({context!r}) must be forkserver or spawn")
    return vectorization, AutoresetMode[autoreset], context


def builder(
    env_id: str, num_envs: int, options: EnvOptions, budget: RestartBudget, timeout: float
) -> Callable[[], GymVectorEnv]:
    """What builds gym:<env_id>; options vectorization (sync, async, native), autoreset, context, wrappers.

    Raises: ConfigError for an unknown id, option or wrapper.
    """
    name = f"gym:{env_id}"
    _check_known(env_id)
    backend = dict(options.backend)
    if backend.get("vectorization") == "native":
        backend.pop("vectorization")
        if options.action_repeat > 1:
            raise ConfigError(f"{name} steps as one native vector: action_repeat must be 1, or use sync")
        if options.time_limit is not None:
            backend["max_episode_steps"] = options.time_limit
        make_vector, outer = partial(_make_native, env_id, num_envs, backend), options
    else:
        outer = GUARDED
        vectorization, autoreset, context = vector_settings(backend)
        wrappers = tuple(backend.pop("wrappers", ()))
        make = partial(make_single, env_id, options.time_limit, wrappers, backend)
        make_vector = partial(
            vectorize, name, make, num_envs, options,
            vectorization=vectorization, autoreset=autoreset, context=context,
        )  # fmt: skip
    return lambda: GymVectorEnv(name, make_vector(), outer, budget, timeout=timeout)


def make_single(
    env_id: str, time_limit: int | None, wrappers: tuple[str, ...], kwargs: Mapping[str, Any]
) -> gymnasium.Env[Any, Any]:
    """One environment of a registered id; also runs inside worker processes."""
    _register(env_id)
    limit = {} if time_limit is None else {"max_episode_steps": time_limit}
    try:
        env = gymnasium.make(env_id, disable_env_checker=True, **limit, **kwargs)
    except Exception as error:  # a stranger's constructor: all we can do is name it
        raise ConfigError(f"gymnasium cannot make {env_id!r} with options {dict(kwargs)}: {error}") from error
    for wrapper in wrappers:
        env = _wrapper(wrapper)(env)
    return env


def _make_native(env_id: str, num_envs: int, kwargs: Mapping[str, Any]) -> VectorEnv[Any, Any, Any]:
    _register(env_id)
    try:
        return gymnasium.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **kwargs)
    except (TypeError, ValueError, ImportError, gymnasium.error.Error) as error:
        raise ConfigError(f"gymnasium cannot make {env_id!r} as a native vector: {error}") from error


def _wrapper(path: str) -> Callable[[Any], Any]:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"env option wrappers names {path!r}, must be <module>:<class>: {error}") from error


def _register(env_id: str) -> None:
    """Import the packages that register ids on import."""
    if env_id.startswith(("MiniGrid-", "BabyAI-")) and env_id not in gymnasium.registry:
        try:
            importlib.import_module("minigrid")
        except ImportError as error:
            raise ConfigError(f"gym:{env_id} needs the minigrid package; pip install minigrid") from error


def _check_known(env_id: str) -> None:
    _register(env_id)
    try:
        with warnings.catch_warnings():  # old versions of an id are the user's choice
            warnings.simplefilter("ignore")
            gymnasium.spec(env_id)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        near = difflib.get_close_matches(env_id, list(gymnasium.registry), n=4, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "list them with gymnasium.pprint_registry()"
        raise ConfigError(f"gymnasium has no environment {env_id!r} ({error}); {hint}") from error
