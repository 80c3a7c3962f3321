"""Everything that is measured on one world model, in one report: what holds, how far it sees, whom it obeys.

Last stop of the evaluation: `rows` -> `compounding`, `invariants`, `counterfactual`, `realtime` -> here. What
needs the truth about other actions needs a reference (`oracle.OracleModel`); all else only rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from learner.evaluation.compounding import Curve, compounding, predict, shuffled_actions
from learner.evaluation.counterfactual import Counterfactual, PlanGap, counterfactual, plan_gap
from learner.evaluation.invariants import Check, invariants
from learner.evaluation.realtime import latency
from learner.evaluation.rows import Rows
from learner.interfaces import ImaginedPolicy, WorldModel
from system.errors import ConfigError

LEAST_ROWS = 3


class Bars(NamedTuple):
    """What a model must reach to count as knowing its world."""

    useful_horizon: int = 15  # steps open loop better than copying; fewer where episodes are shorter
    shuffle: float = 1.2  # times larger the error must be with the actions of others
    retrieval: float = 0.5  # share of futures matched to their own actions; chance is 1/futures


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldModelReport:
    """Made by `evaluate_model`, taken by the command line, plots and proofs."""

    sequences: int
    seen: int  # rows seen before predicting
    horizon: int
    curves: Mapping[str, Curve]  # obs, obs/<key>, obs/<image>/changed, reward, cont, feat
    shuffle: Mapping[str, float]  # error with shuffled actions over that with the right ones, per channel
    checks: tuple[Check, ...]
    latency: Mapping[str, float]  # milliseconds at batch 1
    counterfactual: Counterfactual | None = None  # with a reference only
    plan: PlanGap | None = None  # with a reference and a policy only, of models that predict rewards
    scores: tuple[str, ...] = field(default=())  # names of the checks that a trained model passes

    @property
    def main(self) -> Curve:
        """The curve by which the model is judged: observations, or features where none are decoded."""
        return self.curves["obs"] if "obs" in self.curves else self.curves["feat"]

    @property
    def sound(self) -> bool:
        """Whether all that must hold of any model, trained or not, holds."""
        return all(check.passed for check in self.checks if check.name not in self.scores)

    @property
    def passed(self) -> bool:
        """Whether it is sound and knows its world."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None."""
        return _finite(
            {
                "sequences": self.sequences,
                "seen": self.seen,
                "horizon": self.horizon,
                "useful_horizon": self.main.useful_horizon,
                "sound": self.sound,
                "passed": self.passed,
                "curves": {key: curve.to_json() for key, curve in self.curves.items()},
                "shuffle": dict(self.shuffle),
                "checks": [check.to_json() for check in self.checks],
                "latency": dict(self.latency),
                "counterfactual": self.counterfactual.to_json() if self.counterfactual else None,
                "plan": self.plan.to_json() if self.plan else None,
            }
        )

    def text(self) -> str:
        """A line per finding."""
        lines = [
            f"open loop after {self.seen} rows, {self.sequences} sequences, {self.horizon} steps; "
            "errors in standard deviations at 1, 5, 15, 50 steps:",
        ]
        for key, curve in self.curves.items():
            picked = [k for k in (1, 5, 15, 50) if k <= curve.counted]
            told = ", ".join(f"{curve.model[k - 1]:.3f} (copy {curve.copy[k - 1]:.3f})" for k in picked)
            lines.append(f"  {key}: {told}; useful horizon {curve.useful_horizon} of {curve.counted}")
        lines += [
            f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.value:.4g} ({check.rule})"
            for check in self.checks
        ]
        if self.plan:
            lines.append(
                f"  its own plans: imagined return {self.plan.imagined_return:.2f}, "
                f"real {self.plan.real_return:.2f}"
            )
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_model(
    model: WorldModel,
    rows: Rows,
    *,
    seed: int,
    reference: WorldModel | None = None,
    policy: ImaginedPolicy | None = None,
    futures: int = 8,
    branch: int = 15,
    bars: Bars = Bars(),  # noqa: B008, a constant
) -> WorldModelReport:
    """Measure everything that model, rows and reference allow. Same seed, same report, latencies apart.

    futures, branch: number and length of the action sequences imagined from each start.
    Raises: ConfigError for fewer than two sequences or three rows.
    """
    if rows.sequences < 2 or rows.time < LEAST_ROWS:
        raise ConfigError(
            f"{rows.sequences} sequences of {rows.time} rows cannot be evaluated: at least 2 of {LEAST_ROWS} "
            "are needed; raise the number or length of sequences"
        )
    generator = torch.Generator(rows.batch["is_first"].device).manual_seed(seed)
    prediction = predict(model, rows, generator)
    curves = compounding(model, prediction)
    shuffle = shuffled_actions(model, prediction, generator)
    checks = invariants(model, rows, generator)
    told = plan = None
    if reference is not None:
        told = counterfactual(model, reference, rows, generator, futures=futures, horizon=branch)
        if policy is not None and "reward" in model.caps & reference.caps:
            plan = plan_gap(model, reference, rows, policy, generator, horizon=branch)
    main = "obs" if "obs" in curves else "feat"
    scores = _scores(curves[main], main, shuffle, told, bars)
    return WorldModelReport(
        sequences=rows.sequences,
        seen=rows.seen,
        horizon=rows.horizon,
        curves=curves,
        shuffle=shuffle,
        checks=(*checks, *scores),
        latency=latency(model, rows, generator),
        counterfactual=told,
        plan=plan,
        scores=tuple(check.name for check in scores),
    )


def _scores(
    curve: Curve, name: str, shuffle: Mapping[str, float], told: Counterfactual | None, bars: Bars
) -> list[Check]:
    """What only a model that knows its world passes."""
    wanted = min(bars.useful_horizon, curve.counted)
    found = [
        Check(
            name="useful_horizon",
            passed=0 < wanted <= curve.useful_horizon,
            value=float(curve.useful_horizon),
            rule=f"steps of {name} better than a copy of the last row; must be at least {wanted}",
        ),
        Check(
            name="action_shuffle",
            passed=shuffle[name] >= bars.shuffle,
            value=shuffle[name],
            rule=f"error with other actions over that with the right ones; must be at least {bars.shuffle}",
        ),
    ]
    if told is not None:
        found.append(
            Check(
                name="counterfactual",
                passed=told.retrieval >= bars.retrieval,
                value=told.retrieval,
                rule=f"share of {told.futures} futures matched to their actions; must be >= {bars.retrieval}",
            )
        )
    return found
