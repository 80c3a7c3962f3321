"""What the health monitor may raise: each alarm with its cause in words and what to do about it.

Docs, alert rules and the monitor read this one table. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["warning", "critical"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One kind of trouble."""

    name: str
    watches: str  # the metrics and the condition, in words
    cause: str
    remedy: str
    severity: Severity = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An alarm that is on. Made by HealthMonitor, taken by the event log, status and summary."""

    alarm: str
    since_update: int
    value: float
    limit: float
    detail: str  # what is broken in particular: a module, a direction; may be empty
    cause: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthEvent:
    """An alarm going on or off. Made by HealthMonitor, once per onset and once when it clears."""

    kind: Literal["raised", "cleared"]
    update: int
    raised: Raised


ALARMS: tuple[Alarm, ...] = (
    Alarm(
        name="nonfinite",
        watches="`nonfinite` > 0: an update had a NaN or infinite loss or gradient and was skipped",
        cause="the named input, weight, loss or gradient is the first in the flow of data that was not "
        "finite",
        remedy="input: mend the environment or the dataset that made the value; weights, loss or "
        "gradient: lower learner.settings.lr or lengthen warmup; after ten in a row the learner "
        "goes back to its checkpoint itself",
        severity="critical",
    ),
    Alarm(
        name="kl_collapse",
        watches="`loss/dyn` at the free nats while `entropy/marginal` - `entropy/posterior`, the "
        "information that latents hold about rows, is below `kl_information`",
        cause="the posterior equals the prior: latents carry nothing of the observations, which are "
        "constant, or whose reconstruction weighs too little against the KL",
        remedy="look at the observations in the replay; raise learner.settings.scales.reconstruction or "
        "lower scales.rep; check that free_nats is above 0",
        severity="critical",
    ),
    Alarm(
        name="kl_explosion",
        watches="`loss/dyn` above `kl_share` of the largest KL there can be",
        cause="the prior cannot follow the posterior: the dynamics are not learned, or jump with every "
        "update",
        remedy="lower learner.settings.lr; check that actions in the replay are those that were taken, "
        "and that is_first marks every first row",
        severity="critical",
    ),
    Alarm(
        name="return_saturated",
        watches="the largest of `imagined/return`, `imagined/value` and `imagined/return_scale` above "
        "`return_share` of the outermost bin",
        cause="returns leave the range that two-hot bins can express: rewards are huge or values run away",
        remedy="scale the rewards down in the environment; if they are small, lower learner.settings.lr",
        severity="critical",
    ),
    Alarm(
        name="return_flat",
        watches="`replayed/reward_std` times the discount horizon below `return_least` of the "
        "normaliser's floor, while `imagined/return_scale` is at that floor",
        cause="rewards are so small that returns differ far less than the floor of their normaliser: "
        "the policy sees almost no advantage beside its entropy bonus",
        remedy="scale the rewards up in the environment, or lower learner.settings.return_floor and "
        "learner.settings.entropy",
    ),
    Alarm(
        name="entropy_collapse",
        watches="`entropy/policy` below `entropy_low` of its range",
        cause="the policy became deterministic: it no longer explores and its gradient is gone",
        remedy="raise learner.settings.entropy or actor_unimix; if returns are as high as they can be, "
        "ignore it",
    ),
    Alarm(
        name="entropy_maximum",
        watches="`entropy/policy` above `entropy_high` of its range, although replayed rewards differ",
        cause="the policy stays random: its advantages are noise, or the entropy bonus outweighs them",
        remedy="lower learner.settings.entropy; see return_flat, value_mismatch and gradient_vanishing "
        "for why there is no advantage",
    ),
    Alarm(
        name="ratio_drift",
        watches="trained over inserted rows against `learner_train_ratio_target`, over `ratio_rows` "
        "inserted rows; rows that were owed before may be made up for",
        cause="learner and actors are not kept in step: limiter and books disagree, or one side went on "
        "alone",
        remedy="compare learner_train_ratio_minute and learner_stall_seconds_total; run `dreamfleet "
        "audit`; a band that is too wide is narrowed by replay.tolerance",
    ),
    Alarm(
        name="reward_mismatch",
        watches="`imagined/reward` against `replayed/reward`, in units of `replayed/reward_std`",
        cause="imagination promises other rewards than the environment pays: the reward head is wrong, "
        "or the policy exploits errors of the model",
        remedy="see loss/reward and imagination_drift; raise scales.reward or the train ratio, shorten "
        "learner.settings.horizon",
    ),
    Alarm(
        name="value_mismatch",
        watches="`replayed/value` against `replayed/return` of the same rows, over the size of the "
        "returns, unless the value is catching up",
        cause="the critic is not what follows: it does not learn, or overestimates and feeds on itself",
        remedy="lower learner.settings.lr; check scales.value and scales.replay_value; see "
        "gradient_vanishing for the critic",
    ),
    Alarm(
        name="imagination_drift",
        watches="`open_loop/error_ratio`: open-loop error of replayed rows over that of copying the last row",
        cause="the world model predicts worse than it did, or never better than copying the last row",
        remedy="new kinds of experience: train on, or raise the train ratio; else lower "
        "learner.settings.lr, check loss/obs, and look at `dreamfleet` open-loop pictures",
    ),
    Alarm(
        name="gradient_explosion",
        watches="`grad_norm` or one `grad_norm/<module>` above `gradient_growth` times its own long-term "
        "mean, or above `gradient_most`",
        cause="the gradient of the named module grew beyond its past; clipping bounds the step, not the "
        "direction",
        remedy="lower learner.settings.lr or agc; look for outliers in rewards and observations of newer "
        "rows",
    ),
    Alarm(
        name="gradient_vanishing",
        watches="a `grad_norm/<module>` below `gradient_least`",
        cause="the named module no longer learns: its loss has weight 0, is saturated, or does not reach it",
        remedy="check learner.settings.scales; dead or saturated layers need a restart with a lower lr",
    ),
    Alarm(
        name="learning_rate",
        watches="`lr` against its setting: stuck below it, or the warmup a large part of the planned updates",
        cause="most of the run is spent on a learning rate below the one that was set",
        remedy="lower learner.settings.warmup; it counts updates, of which there are env_steps * "
        "train_ratio / (batch * length)",
    ),
)

BY_NAME = {alarm.name: alarm for alarm in ALARMS}
