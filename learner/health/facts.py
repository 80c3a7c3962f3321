"""What the monitor must know of a model to judge its figures. Made by a family, taken by HealthMonitor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Bounds of a model's figures; what does not exist in a family keeps its default and is not judged."""

    free_nats: float = 0.0  # below which the KL is not pushed
    kl_most: float = math.inf  # nats; largest KL between posterior and prior
    entropy_least: float = 0.0  # nats, of the policy
    entropy_most: float = math.inf
    return_most: float = math.inf  # outermost bin of value and reward
    return_floor: float = 1.0  # smallest divisor of advantages
    discount_horizon: float = math.inf  # steps over which rewards add up
    lr: float = 0.0  # after the warmup
    warmup: int = 0  # updates
    loss_modules: Mapping[str, str] = field(default_factory=dict[str, str])
    """Module behind each loss part ("obs" stands for all "obs/..."), in the order in which data flow through
    them: where several are not finite, the first is where it began."""
