"""Where did the first number that is not finite come from? Names the input, weight, loss or gradient.

A skipped update leaves the weights as they were, so they can be looked at after the fact. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from learner.health.facts import ModelFacts


def nonfinite_source(values: Mapping[str, float], weights: Mapping[str, float], facts: ModelFacts) -> str:
    """What was first in the flow of data: inputs, then weights, then losses, then gradients, in words.

    `values`: metrics of the skipped update, with input/<key> counting entries that are not finite,
    loss/<part> and grad_norm/<module>; `weights`: peak per module. Gradients flow backwards: of several
    modules with such a gradient the last one in the flow of data got it first.
    """
    if bad := [key for key, value in values.items() if key.startswith("input/") and value > 0.0]:
        keys = ", ".join(f"{key.removeprefix('input/')} ({values[key]:.0f} entries)" for key in bad)
        return f"input {keys}"
    if bad := [module for module, peak in weights.items() if not math.isfinite(peak)]:
        return f"weights of {', '.join(bad)}"
    order = list(facts.loss_modules)
    losses = [key.removeprefix("loss/") for key, value in values.items() if _broken(key, value, "loss/")]
    parts = sorted((part for part in losses if _kind(part) in order), key=lambda p: order.index(_kind(p)))
    if parts:
        rest = f"; also {', '.join(parts[1:])}" if parts[1:] else ""
        return f"loss {parts[0]} of {facts.loss_modules[_kind(parts[0])]}{rest}"
    flow = list(dict.fromkeys(facts.loss_modules.values()))
    modules = [k.removeprefix("grad_norm/") for k, v in values.items() if _broken(k, v, "grad_norm/")]
    if modules:
        modules.sort(key=lambda m: flow.index(m) if m in flow else -1, reverse=True)
        rest = f"; also {', '.join(modules[1:])}" if modules[1:] else ""
        return f"gradient of {modules[0]}{rest}"
    return "an unnamed loss or gradient"


def _broken(key: str, value: float, prefix: str) -> bool:
    return key.startswith(prefix) and not math.isfinite(value)


def _kind(part: str) -> str:
    """obs/image -> obs."""
    return part.split("/", 1)[0]
