"""The door to the families: configs, agents and policies by name. Imports torch only to build something."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.latents import latent_columns
from learner.health.dreamer_facts import dreamer_facts
from learner.health.facts import ModelFacts
from system.errors import ConfigError
from system.interfaces import Policy
from system.specs import ArraySpec, EnvSpec

if TYPE_CHECKING:
    from learner.families.dreamer.agent import DreamerAgent, PrioritySignal

FAMILIES: dict[str, type[DreamerConfig]] = {"dreamer": DreamerConfig}
"""World-model families by name, with the class of their config."""

ACTION_FREE_FAMILIES: frozenset[str] = frozenset()
"""Families whose agents honour `action_mask`: rows without actions and rewards, such as video."""


def make_config(family: str, settings: Mapping[str, Any]) -> DreamerConfig:
    """The validated config of a family. Raises: ConfigError naming the field, its value and the rule."""
    if family not in FAMILIES:
        near = get_close_matches(family, FAMILIES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {sorted(FAMILIES)}"
        raise ConfigError(f"unknown family {family!r}; {hint}")
    kind = FAMILIES[family]
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(_explain(family, kind, error)) from error
    except TypeError as error:  # a list or mapping where the name of a size belongs
        raise ConfigError(
            f"{family} settings {dict(settings)!r:.300}: a value has the wrong type ({error}); see the "
            "fields of its config"
        ) from error


def _explain(family: str, kind: type[BaseModel], error: ValidationError) -> str:
    """One line per wrong field, with the nearest known key for unknown ones."""
    lines: list[str] = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        name = ".".join([family, *path])
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(path[-1], _fields(kind, path[:-1]), 1)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; known keys: {', '.join(_fields(kind, path[:-1]))}"
            )
            lines.append(f"{name} is not a setting{hint}")
        else:
            value = "" if not path else f" ({problem['input']!r})"
            lines.append(f"{name}{value}: {problem['msg']}")
    return "\n".join(lines)


def _fields(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return sorted(kind.model_fields)


def overlay_columns(family: str, config: DreamerConfig, env: EnvSpec) -> dict[str, ArraySpec]:
    """Extra replay columns the family's policy writes and its agent reads. Imports no torch."""
    del env
    _check(family, config)
    return latent_columns(config)


def model_facts(family: str, config: DreamerConfig, env: EnvSpec) -> ModelFacts:
    """Bounds of the family's figures, for the health monitor. Imports no torch."""
    _check(family, config)
    return dreamer_facts(config, env)


def make_agent(
    family: str,
    config: DreamerConfig,
    env: EnvSpec,
    *,
    device: str,
    seed: int,
    priority_signal: PrioritySignal = "none",
) -> DreamerAgent:
    """A learning agent on the device named by auto, cpu, cuda or cuda:<index>.

    `priority_signal`: the errors it writes back as replay priorities, if any.
    Raises: PreflightError when the device is absent.
    """
    import torch

    from learner.capture import make_recorder
    from learner.compiled import make_compiler
    from learner.devices import resolve_device
    from learner.families.dreamer.agent import DreamerAgent
    from system.heap import keep_freed_memory

    _check(family, config)
    where = resolve_device(device)
    if where.type == "cpu":
        keep_freed_memory()
    if where.index is not None and where.type == "cuda":
        torch.cuda.set_device(where)  # streams, graphs and page-locked memory go by the current device
    return DreamerAgent(
        config,
        env,
        device=where,
        seed=seed,
        priority_signal=priority_signal,
        late=where.type == "cuda",  # waiting for a result there would leave the device idle
        recorder=make_recorder(where, config.graph),
        steps=make_compiler(config.compile, config.dtype),
    )


def make_policy(family: str, config: DreamerConfig, env: EnvSpec, *, seed: int, threads: int = 1) -> Policy:
    """An acting policy on the CPU. `threads` > 0 sets torch's thread count for this process; 0 leaves it."""
    import torch

    from learner.families.dreamer.policy import DreamerPolicy

    _check(family, config)
    if threads:
        torch.set_num_threads(threads)
    return DreamerPolicy(config, env, seed=seed)


def policy_shapes(family: str, config: DreamerConfig, env: EnvSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a policy of these settings takes, by name; found without memory for them.

    Raises: RuntimeError for sizes that no tensor can have.
    """
    import torch

    from learner.families.dreamer.behavior import make_actor
    from learner.families.dreamer.world_model import make_encoder, rssm_sizes
    from learner.nn.acting import PlainStep
    from learner.nn.rssm import RSSM

    _check(family, config)
    with torch.device("meta"):
        sizes, encoder = rssm_sizes(config), make_encoder(config, env)
        rssm = RSSM(sizes, env.action.width, encoder.outputs, acting=True)
        step = PlainStep(encoder, rssm, make_actor(config, sizes.feat, env.action), env.action.width)
    return {name: tuple(parameter.shape) for name, parameter in step.named_parameters()}


def _check(family: str, config: DreamerConfig) -> None:
    if not isinstance(config, FAMILIES.get(family, ())):
        raise ConfigError(
            f"config {type(config).__name__} does not belong to family {family!r}; use make_config"
        )
