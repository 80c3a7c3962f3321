"""Open-loop prediction: see `context` rows, then predict the rest from the actions alone, beside the truth.

Works on any world model through its contract. Errors are set against copying the last seen row, because small
average errors are easy where little moves. Letters: B sequences, T rows, H = T - context predicted rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.evaluation.rows import Predictor, observe, rows_of
from system.experience import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """One report. Made by `open_loop`, taken by whoever writes videos and curves."""

    context: int
    images: Mapping[str, NDArray[np.uint8]]  # each [3, B, T, height, width, C]: truth, model, error
    error: Mapping[str, NDArray[np.float64]]  # per key [H]: mean absolute, or share of wrong classes
    copy_error: Mapping[str, NDArray[np.float64]]  # the same for copying row context - 1
    valid: NDArray[np.int64]  # [H], sequences still inside the episode they were seen in


@torch.no_grad()
def open_loop(agent: Predictor, sequence: Sequence, *, context: int, seed: int) -> OpenLoop:
    """Predict rows context.. of every sequence. Rows behind an episode border count in no error.

    Keys of the errors: every observation key of a model that decodes, and "reward" of one that predicts it.
    Raises: ConfigError when `context` leaves nothing to see or nothing to predict.
    """
    rows = rows_of(agent, sequence, context)
    model, batch, size, horizon = agent.model, rows.batch, rows.sequences, rows.horizon
    generator = torch.Generator(batch["is_first"].device).manual_seed(seed)
    carry, states = observe(model, rows, model.noise(size, context, generator), stop=context)
    rollout = model.imagine(carry, horizon, rows.actions, model.noise(size, horizon, generator))
    decode = frozenset({"obs"} if "decode" in model.caps else ())
    filtered, predicted = (model.read(said, decode).get("obs", {}) for said in (states, rollout.state))
    inside = rows.inside.long()  # [B, H]
    images, error, copied = {}, {}, {}
    for key, said in predicted.items():
        truth, discrete = batch["obs"][key], model.obs_space[key].kind == "discrete"
        if model.obs_space[key].kind == "image":
            images[key] = _film(truth, torch.cat([filtered[key], said], 1))
        last = truth[:, context - 1 : context].expand(-1, horizon, *truth.shape[2:])
        error[key] = _error(truth[:, context:], said, inside, discrete=discrete)
        copied[key] = _error(truth[:, context:], last, inside, discrete=discrete)
    if "reward" in model.caps:
        reward = batch["reward"]
        last = reward[:, context - 1 : context].expand(-1, horizon)
        error["reward"] = _error(reward[:, context:], rollout.out["reward"], inside, discrete=False)
        copied["reward"] = _error(reward[:, context:], last, inside, discrete=False)
    valid = inside.sum(0).cpu().numpy()
    return OpenLoop(context=context, images=images, error=error, copy_error=copied, valid=valid)


def _film(truth: Tensor, model: Tensor) -> NDArray[np.uint8]:
    """Truth, model and their difference (grey where equal) as uint8 [3, B, T, height, width, C]."""
    shown = model.round().clamp(0.0, 255.0).to(torch.uint8)
    difference = ((shown.int() - truth.int() + 255) // 2).to(torch.uint8)
    return torch.stack([truth, shown, difference]).cpu().numpy()


def _error(truth: Tensor, predicted: Tensor, inside: Tensor, *, discrete: bool) -> NDArray[np.float64]:
    """Mean error per predicted row [H] over sequences still inside their episode; 0 where none is left."""
    wrong = (truth != predicted).double() if discrete else (truth.double() - predicted.double()).abs()
    rows = wrong.flatten(2).mean(-1) if wrong.dim() > 2 else wrong  # [B, H]
    return ((rows * inside).sum(0) / inside.sum(0).clamp_min(1)).cpu().numpy()


def film_strip(images: NDArray[np.uint8], limit: int = 6) -> NDArray[np.uint8]:
    """Frames [T, 3 * height, n * width, C]: n <= limit sequences side by side; truth, model, error below.

    images as in OpenLoop.images.
    """
    part = images[:, :limit]  # [3, n, T, height, width, C]
    three, count, time, height, width, channels = part.shape
    return part.transpose(2, 0, 3, 1, 4, 5).reshape(time, three * height, count * width, channels)
