"""Limits of the learning-health monitor: the `learner.health` section of a run. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from system.config import StrictConfig


class HealthSettings(StrictConfig):
    """When an alarm is raised. A limit must be broken `patience` updates in a row, averages included."""

    enabled: bool = True
    """Watch at all. Off: no alarms, no open-loop probes; updates that are not finite are still counted."""
    quiet_updates: int = Field(300, ge=0)
    """Updates after a start, and after the warmup, in which only `nonfinite` and `learning_rate` may be
    raised: everything is far from where it will be there."""
    window: int = Field(50, ge=1)
    """Updates over which signals are averaged (time constant of an exponential mean)."""
    patience: int = Field(100, ge=1)
    """Updates in a row for which a limit must be broken before its alarm is raised, and kept, with
    `margin`, before it is cleared."""
    long_patience: int = Field(2000, ge=1)
    """The same for `entropy_maximum` and `return_flat`: sparse rewards take time to find."""
    margin: float = Field(0.2, ge=0, lt=1)
    """Share of the limit by which a value must be better than it to clear the alarm."""

    kl_information: float = Field(0.25, ge=0)
    """`kl_collapse`: least nats by which the latents of different rows tell the rows apart."""
    kl_share: float = Field(0.5, gt=0, le=1)
    """`kl_explosion`: largest dynamics loss, as a share of the largest KL that the unimix allows."""
    return_share: float = Field(0.1, gt=0, le=1)
    """`return_saturated`: largest return or value, as a share of the outermost bin."""
    return_least: float = Field(0.05, ge=0)
    """`return_flat`: least that rewards can make of a difference over the discount horizon, as a share of the
    floor of the return normaliser."""
    entropy_low: float = Field(0.005, ge=0, lt=1)
    """`entropy_collapse`: least policy entropy, as a share of the way from its least to its most."""
    entropy_high: float = Field(0.99, gt=0, le=1)
    """`entropy_maximum`: largest policy entropy, on the same scale."""
    ratio_error: float = Field(0.1, gt=0)
    """`ratio_drift`: largest relative difference of the train ratio held from the one asked for."""
    ratio_rows: int = Field(2000, ge=1)
    """Inserted rows over which the ratio is judged; more where the limiter's band is too wide for so few."""
    reward_error: float = Field(3.0, gt=0)
    """`reward_mismatch`: largest distance of imagined from replayed mean reward, in spreads of these."""
    value_error: float = Field(0.7, gt=0)
    """`value_mismatch`: largest distance of the mean value of replayed rows from their mean return, as a
    share of the size of the returns."""
    gradient_growth: float = Field(100.0, gt=1)
    """`gradient_explosion`: largest factor of a gradient norm over its own long-term mean."""
    gradient_most: float = Field(1e6, gt=0)
    """`gradient_explosion`: largest gradient norm of the whole model, whatever its past."""
    gradient_least: float = Field(1e-9, ge=0)
    """`gradient_vanishing`: least gradient norm of any module."""
    warmup_share: float = Field(0.25, gt=0, le=1)
    """`learning_rate`: largest share of the planned updates that the warmup may take."""
    warmup_updates: int = Field(10_000, ge=1)
    """`learning_rate`: updates after which the rate must be half of its setting, in runs without a plan."""

    probe_updates: int = Field(500, ge=0)
    """Updates between two open-loop probes of the world model; 0: none."""
    probe_sequences: int = Field(8, ge=1)
    """Sequences of the batch that a probe predicts: with the two below, what bounds its cost."""
    probe_context: int = Field(5, ge=1)
    """Rows that the model sees before it predicts."""
    probe_horizon: int = Field(15, ge=1)
    """Rows that it predicts, as far as the sequences reach."""
    probe_patience: int = Field(3, ge=1)
    """Probes in a row before `imagination_drift` is raised or cleared."""
    drift_growth: float = Field(2.0, gt=1)
    """`imagination_drift`: largest factor of the open-loop error over its own best, once it loses to copying
    the last row."""
    drift_updates: int = Field(5000, ge=1)
    """`imagination_drift`: updates within which the error must fall below that of copying the last row."""
