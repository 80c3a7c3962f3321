"""What the health monitor must know of a DreamerV3 agent: the bounds of its figures. Imports no torch."""

from __future__ import annotations

import math

from learner.families.dreamer.config import DreamerConfig
from learner.health.facts import ModelFacts
from system.specs import ActionSpec, EnvSpec

LOSS_MODULES = {
    "dyn": "rssm",
    "rep": "rssm",
    "obs": "decoder",
    "reward": "reward",
    "cont": "cont",
    "replay_value": "critic",
    "value": "critic",
    "policy": "actor",
}


def dreamer_facts(config: DreamerConfig, env: EnvSpec) -> ModelFacts:
    """Bounds that follow from the config and the action space."""
    least, most = _entropies(config, env.action)
    # A class has at least unimix / classes: a posterior on one class is at most this far from the prior.
    farthest = config.stoch * math.log(config.classes / config.unimix) if config.unimix else math.inf
    return ModelFacts(
        free_nats=config.free_nats,
        kl_most=farthest,
        entropy_least=least,
        entropy_most=most,
        return_most=math.expm1(20.0),
        return_floor=config.return_floor,
        discount_horizon=config.discount_horizon,
        lr=config.lr,
        warmup=config.warmup,
        loss_modules=LOSS_MODULES,
    )


def _entropies(config: DreamerConfig, action: ActionSpec) -> tuple[float, float]:
    """Least and most entropy of the policy in nats, summed over the parts of the action."""
    if action.kind == "continuous":
        unit = 0.5 * math.log(2.0 * math.pi * math.e)  # entropy of a normal with standard deviation 1
        return (
            action.size * (unit + math.log(config.min_std)),
            action.size * (unit + math.log(config.max_std)),
        )
    least = sum(_mixed_entropy(config.actor_unimix, classes) for classes in action.classes)
    return least, sum(math.log(classes) for classes in action.classes)


def _mixed_entropy(unimix: float, classes: int) -> float:
    """Entropy of one class mixed with `unimix` of the uniform distribution."""
    if unimix == 0.0:
        return 0.0
    rest = unimix / classes
    top = 1.0 - unimix + rest
    return -top * math.log(top) - (classes - 1) * rest * math.log(rest)
