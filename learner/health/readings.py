"""The rules: averaged signals in, one reading per alarm out. Pure functions of floats; no torch, no clock.

Between `averages` (what is measured) and `monitor` (how long a limit must be broken). A rule whose signals a
model does not have returns None and is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from learner.health.averages import Averages
from learner.health.facts import ModelFacts
from learner.health.settings import HealthSettings

TINY = 1e-20
"""Stands for a gradient of exactly zero, whose logarithm is wanted."""
CATCHING_UP = 0.1
"""Share of its distance from the returns that a critic which learns makes good within a long window."""
LARGEST_EXPONENT = 300.0
VISIBLE_SHARE = 0.01
"""Share of the whole gradient's usual norm below which a module's own norm is not called usual."""
REWARD_SPREAD = 0.05
"""Least spread of rewards that imagined ones are measured in: the heads' resolution near zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One judgement. Made by a rule, taken by HealthMonitor. Neither broken nor healed: as it was."""

    value: float
    limit: float
    broken: bool
    healed: bool
    detail: str = ""


def above(value: float, limit: float, margin: float, detail: str = "") -> Reading:
    """Broken above `limit`; healed below it by `margin`, a share of it."""
    healed = value < limit * (1.0 - margin)
    return Reading(value=value, limit=limit, broken=value > limit, healed=healed, detail=detail)


def below(value: float, limit: float, margin: float, detail: str = "") -> Reading:
    """Broken below `limit`; healed above it by `margin`, a share of it."""
    healed = value > limit * (1.0 + margin)
    return Reading(value=value, limit=limit, broken=value < limit, healed=healed, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All that a rule may look at. Made by HealthMonitor once per update."""

    update: int  # over all resumes
    short: Averages
    long: Averages  # of the replayed value, and of base-10 logarithms of gradient norms
    facts: ModelFacts
    settings: HealthSettings
    planned_updates: float | None
    lr: float | None  # of the newest update
    lr_still: int  # updates for which it has not grown


def kl_collapse(look: Look) -> Reading | None:
    got = look.short.all("loss/dyn", "entropy/marginal", "entropy/posterior")
    if got is None:
        return None
    dyn, marginal, posterior = got
    limit, information = look.settings.kl_information, max(0.0, marginal - posterior)
    at_floor = dyn <= 1.05 * look.facts.free_nats + 0.01
    reading = below(information, limit, look.settings.margin, f"loss/dyn {dyn:.3g}")
    return Reading(
        value=information,
        limit=limit,
        broken=reading.broken and at_floor,
        healed=reading.healed or not at_floor,
        detail=reading.detail,
    )


def kl_explosion(look: Look) -> Reading | None:
    got = look.short.all("loss/dyn")
    if got is None or not math.isfinite(look.facts.kl_most):
        return None
    return above(got[0], look.settings.kl_share * look.facts.kl_most, look.settings.margin)


def return_saturated(look: Look) -> Reading | None:
    names = ("imagined/return", "imagined/value", "imagined/return_scale")
    got = look.short.all(*names)
    if got is None:
        return None
    largest = max(range(3), key=lambda i: abs(got[i]))
    limit = look.settings.return_share * look.facts.return_most
    return above(abs(got[largest]), limit, look.settings.margin, names[largest])


def return_flat(look: Look) -> Reading | None:
    got = look.short.all("imagined/return_scale", "replayed/reward_std")
    if got is None:
        return None
    scale, rewards = got
    floor, limit = look.facts.return_floor, look.settings.return_least
    # Not the range of imagined returns: an untrained critic alone makes one of some tenths.
    reach = rewards * look.facts.discount_horizon / floor
    reading = below(reach, limit, look.settings.margin, f"spread of replayed rewards {rewards:.3g}")
    return reading if rewards > 0.0 and scale <= floor * 1.01 else _unjudged(reading)


def entropy_collapse(look: Look) -> Reading | None:
    share = _entropy_share(look)
    return None if share is None else below(share, look.settings.entropy_low, look.settings.margin)


def entropy_maximum(look: Look) -> Reading | None:
    share, got = _entropy_share(look), look.short.all("replayed/reward_std")
    if share is None or got is None:
        return None
    limit = look.settings.entropy_high
    # Near 1 a share of the limit would lie beyond it: what counts is the distance from the maximum.
    healed = 1.0 - share > (1.0 - limit) * (1.0 + look.settings.margin)
    reading = Reading(value=share, limit=limit, broken=share > limit, healed=healed)
    return reading if got[0] > 0.0 else _unjudged(reading)


def _entropy_share(look: Look) -> float | None:
    """Where the policy's entropy is between its least (0) and its most (1)."""
    got = look.short.all("entropy/policy")
    least, most = look.facts.entropy_least, look.facts.entropy_most
    if got is None or not math.isfinite(most) or most <= least:
        return None
    return (got[0] - least) / (most - least)


def reward_mismatch(look: Look) -> Reading | None:
    got = look.short.all("imagined/reward", "replayed/reward", "replayed/reward_std")
    if got is None:
        return None
    imagined, replayed, std = got
    spread = max(std, 0.1 * abs(replayed), REWARD_SPREAD)
    detail = f"imagined {imagined:.4g}, replayed {replayed:.4g}"
    return above(abs(imagined - replayed) / spread, look.settings.reward_error, look.settings.margin, detail)


def value_mismatch(look: Look) -> Reading | None:
    got = look.short.all("replayed/value", "replayed/return", "replayed/return_std")
    if got is None:
        return None
    value, target, std = got
    gap, size = abs(value - target), max(std, abs(target), look.facts.return_floor)
    detail = f"value {value:.4g}, return {target:.4g}"
    reading = above(gap / size, look.settings.value_error, look.settings.margin, detail)
    # While returns grow, a healthy critic runs after them, far behind when the learning rate is low.
    before = look.long.get("replayed/value")
    if before is not None and abs(before - target) - gap > CATCHING_UP * gap:
        return Reading(value=reading.value, limit=reading.limit, broken=False, healed=reading.healed)
    return reading


def gradient_explosion(look: Look) -> Reading | None:
    got = look.short.all("grad_norm")
    if got is None:
        return None
    settings, worst, where = look.settings, 0.0, "grad_norm"
    # From almost nothing any gradient is a thousandfold, such as an actor's that finds its first reward:
    # growth counts from a share of the whole on.
    least = (look.long.get("grad_norm") or 0.0) + math.log10(VISIBLE_SHARE)
    for name in look.long.names("grad_norm"):
        now, usual = look.short.get(f"log {name}"), look.long.get(name)
        if now is None or usual is None:
            continue
        growth = 10.0 ** min(now - max(usual, least), LARGEST_EXPONENT)
        if growth > worst:
            worst, where = growth, name
    if got[0] > settings.gradient_most:
        return above(got[0], settings.gradient_most, settings.margin, where)
    return above(worst, settings.gradient_growth, settings.margin, where)


def gradient_vanishing(look: Look) -> Reading | None:
    names = look.short.names("log grad_norm/")
    if not names:
        return None
    logs = {name: value for name in names if (value := look.short.get(name)) is not None}
    norms = {name: 10.0 ** min(value, LARGEST_EXPONENT) for name, value in logs.items()}
    least = min(norms, key=lambda name: norms[name])
    dead = [
        name.removeprefix("log grad_norm/") for name in names if norms[name] < look.settings.gradient_least
    ]
    return below(norms[least], look.settings.gradient_least, look.settings.margin, ", ".join(dead))


def learning_rate(look: Look) -> Reading | None:
    facts, settings = look.facts, look.settings
    if look.lr is None or facts.lr <= 0.0:
        return None
    share, still = look.lr / facts.lr, look.lr_still
    if share >= 0.5:
        return Reading(value=share, limit=0.5, broken=False, healed=True)
    if still > settings.patience:
        return Reading(
            value=share, limit=0.5, broken=True, healed=False, detail=f"unchanged for {still} updates"
        )
    if look.planned_updates is None:
        late = look.update > settings.warmup_updates
        return Reading(value=share, limit=0.5, broken=late, healed=not late, detail=f"warmup {facts.warmup}")
    planned, limit = look.planned_updates, settings.warmup_share
    detail = f"warmup of {facts.warmup} updates, {planned:.0f} are planned"
    return above(facts.warmup / max(1.0, planned), limit, settings.margin, detail)


def _unjudged(reading: Reading) -> Reading:
    """Nothing is wrong where there is nothing to learn from."""
    return Reading(value=reading.value, limit=reading.limit, broken=False, healed=True)


RULES: dict[str, Callable[[Look], Reading | None]] = {
    "kl_collapse": kl_collapse,
    "kl_explosion": kl_explosion,
    "return_saturated": return_saturated,
    "return_flat": return_flat,
    "entropy_collapse": entropy_collapse,
    "entropy_maximum": entropy_maximum,
    "reward_mismatch": reward_mismatch,
    "value_mismatch": value_mismatch,
    "gradient_explosion": gradient_explosion,
    "gradient_vanishing": gradient_vanishing,
    "learning_rate": learning_rate,
}
"""Judged after every update; `nonfinite`, `ratio_drift` and `imagination_drift` have their own occasions."""
