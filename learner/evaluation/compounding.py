"""How errors grow with the horizon: open loop beside copying the last row, the data's mean, and one step.

The model sees `seen` rows, then predicts the rest from the actions alone. Useful horizon: the predicted steps
before the first one where copying the last seen row is as good. Errors are root mean squares in standard
deviations of the data; of classes, the root of the share that is wrong.
Letters: B sequences, T rows, H = T - seen predicted rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.evaluation.channels import OBS, Ruler, Values, channels, compared, read_values, true_values
from learner.evaluation.rows import Rows, at_row, map_leaves, observe
from learner.interfaces import Rollout, Tree, WorldModel

Errors = NDArray[np.float64]
Look = Literal["all", "each", "changed"]
CLOSER: dict[str, Look] = {"image": "changed", "box": "each"}
"""How observations are looked at a second time, by their kind."""
PICKED = (1, 5, 15, 50)
"""Horizons told in summaries."""
DELTA_FRAME = 4
"""Predicted frame at which the gain by the right actions is told; arXiv 2402.15391 tells it there too."""
FEWEST = 8
"""A step counts towards the useful horizon while an eighth of the sequences, or so many, are inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Rows as they were and as the model says. Made by `predict`, taken by what needs no reference."""

    rows: Rows
    states: Tree  # [B, T, ...], after seeing each row
    rollout: Rollout  # [B, H, ...], open loop
    truth: Values  # each [B, T, ...]
    filtered: Values  # each [B, T, ...], said of rows that were seen
    open_loop: Values  # each [B, H, ...]
    one_step: Values  # each [B, H, ...], from the state after the row before
    ruler: Ruler


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Errors of one channel. Made by `compounding`, taken by reports and plots. All [H]."""

    model: Errors  # open loop
    copy: Errors  # of the last seen row
    mean: Errors  # of the data's mean, or commonest class
    one_step: Errors  # teacher forced: every row before it was seen
    one_step_copy: Errors  # of the row before
    filtered: Errors  # what the model says of a row that it sees
    counted: int  # steps with enough sequences inside to count

    @property
    def useful_horizon(self) -> int:
        """Steps before the first that is no better than copying the last seen row."""
        return steps_better(self.model[: self.counted], self.copy)

    @property
    def better_than_mean(self) -> int:
        """Steps before the first that is no better than the data's mean."""
        return steps_better(self.model[: self.counted], self.mean)

    def to_json(self) -> dict[str, Any]:
        names = ("model", "copy", "mean", "one_step", "one_step_copy", "filtered")
        picked = [k for k in PICKED if k <= self.counted]
        return {name: [float(x) for x in getattr(self, name)] for name in names} | {
            "counted": self.counted,
            "useful_horizon": self.useful_horizon,
            "better_than_mean": self.better_than_mean,
            "over_copy": {str(k): _ratio(self.model[k - 1], self.copy[k - 1]) for k in picked},
            "over_mean": {str(k): _ratio(self.model[k - 1], self.mean[k - 1]) for k in picked},
        }


def _ratio(error: float, baseline: float) -> float | None:
    return float(error / baseline) if baseline > 0 else None


def steps_better(error: Errors, baseline: Errors) -> int:
    """Leading steps with error < baseline, or no error at all. A tie is no win; NaN is a loss."""
    better = (error < baseline[: len(error)]) | (error == 0)
    return len(better) if better.all() else int(np.argmin(better))


@torch.no_grad()
def predict(model: WorldModel, rows: Rows, generator: torch.Generator) -> Prediction:
    """See all rows, and predict those behind `rows.seen` twice: from the actions alone, and one step each."""
    size, horizon, seen = rows.sequences, rows.horizon, rows.seen
    states = observe(model, rows, model.noise(size, rows.time, generator))[1]
    rollout = model.imagine(
        at_row(states, seen - 1), horizon, rows.actions, model.noise(size, horizon, generator)
    )
    before = map_leaves(lambda leaf: leaf[:, seen - 1 : -1].flatten(0, 1), states)  # [B * H, ...]
    action = rows.actions.flatten(0, 1).unsqueeze(1)  # [B * H, 1, A]
    next_row = model.imagine(before, 1, action, model.noise(size * horizon, 1, generator))
    one_step = read_values(model, next_row.state, next_row.out)  # each [B * H, 1, ...]
    truth = true_values(model, rows.batch, states)
    ahead = {key: value[:, seen:] for key, value in truth.items()}
    return Prediction(
        rows=rows,
        states=states,
        rollout=rollout,
        truth=truth,
        filtered=read_values(model, states),
        open_loop=read_values(model, rollout.state, rollout.out),
        one_step={key: value.squeeze(1).unflatten(0, (size, horizon)) for key, value in one_step.items()},
        ruler=Ruler(channels(model), ahead, rows.inside),
    )


def groups(model: WorldModel) -> dict[str, list[str]]:
    """The channels one by one, and all observations together as `obs`."""
    found = {key: [key] for key in channels(model)}
    together = compared(model)
    return found | {"obs": together} if together[0].startswith(OBS) else found


@torch.no_grad()
def compounding(model: WorldModel, prediction: Prediction) -> dict[str, Curve]:
    """Curves per group of channels, and some that look closer: `<image>/changed` at the pixels that changed,
    since whole frames flatter whoever copies; `<vector>/each` at all entries alike, however little they vary.
    """
    found: dict[str, Curve] = {}
    for name, keys in groups(model).items():
        found[name] = _curve(prediction, keys, "all")
        if name.startswith(OBS) and (closer := CLOSER.get(channels(model)[name].kind)):
            found[f"{name}/{closer}"] = _curve(prediction, keys, closer)
    return found


def _curve(prediction: Prediction, keys: list[str], look: Look) -> Curve:
    seen, inside, truth = prediction.rows.seen, prediction.rows.inside, prediction.truth
    last = {key: truth[key][:, seen - 1 : seen].expand_as(truth[key][:, seen:]) for key in keys}
    middle = {key: prediction.ruler.middle[key].expand_as(last[key]) for key in keys}

    def error(said: Values) -> Errors:
        return _errors(prediction, keys, said, look)

    valid = inside.sum(0).cpu().numpy()
    enough = valid >= max(1, min(FEWEST, prediction.rows.sequences // 8))
    return Curve(
        model=error(prediction.open_loop),
        copy=error(last),
        mean=error(middle),
        one_step=error(prediction.one_step),
        one_step_copy=error({key: truth[key][:, seen - 1 : -1] for key in keys}),
        filtered=error({key: prediction.filtered[key][:, seen:] for key in keys}),
        counted=len(enough) if enough.all() else int(np.argmin(enough)),
    )


def _errors(prediction: Prediction, keys: list[str], said: Values, look: Look = "all") -> Errors:
    """Root mean square [H] over the channels of what is said, over sequences that are inside.

    0 where nothing is left to compare.
    """
    rows, ruler = prediction.rows, prediction.ruler
    parts: list[Tensor] = []
    for key in keys:
        truth = prediction.truth[key][:, rows.seen :]
        squares = ruler.squares(key, truth, said[key], each=look == "each")  # [B, H, E]
        mask = rows.inside.unsqueeze(-1).expand_as(squares)
        if look == "changed":
            last = prediction.truth[key][:, rows.seen - 1 : rows.seen].expand_as(truth)
            mask = mask & (ruler.squares(key, truth, last) > 0)
        total = torch.where(mask, squares, torch.zeros_like(squares)).sum((0, 2))
        parts.append(total / mask.sum((0, 2)).clamp_min(1))
    return torch.stack(parts).mean(0).sqrt().cpu().numpy()


@torch.no_grad()
def shuffled_actions(
    model: WorldModel, prediction: Prediction, generator: torch.Generator
) -> dict[str, float]:
    """How many times larger the open-loop error is with the actions of another sequence, by channels.

    Near 1: the model does not listen to actions. `delta_psnr/<image>`: decibels that the right actions gain
    over those in the 4th predicted frame (or the last).
    """
    rows = prediction.rows
    rollout = model.imagine(
        at_row(prediction.states, rows.seen - 1),
        rows.horizon,
        rows.actions.roll(1, 0),
        model.noise(rows.sequences, rows.horizon, generator),
    )
    wrong = read_values(model, rollout.state, rollout.out)
    found: dict[str, float] = {}
    for name, keys in groups(model).items():
        right, other = (_errors(prediction, keys, said) for said in (prediction.open_loop, wrong))
        found[name] = _times(_whole(other), _whole(right))
        if name in keys and channels(model)[name].kind == "image":
            at = min(DELTA_FRAME, rows.horizon) - 1
            gain = _times(float(other[at]), float(right[at]))
            found[f"delta_psnr/{name.removeprefix(OBS)}"] = 20.0 * math.log10(gain) if gain > 0 else -math.inf
    return found


def _whole(errors: Errors) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _times(one: float, other: float) -> float:
    """Their ratio; 1 when both are 0."""
    if other == 0:
        return math.inf if one > 0 else 1.0
    return one / other
