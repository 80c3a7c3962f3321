"""Does imagination still follow reality? A small open-loop prediction of replayed rows, now and then.

Uses `learner.evaluation.openloop`, with random numbers of its own: training is the same with and without it.
Letters: B sequences, T rows, H predicted rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from learner.evaluation.openloop import OpenLoop, Predictor, open_loop
from system.experience import Sequence, SequenceIds

LEAST_ERROR = 1e-6
"""Copying the last row with less error than this says that nothing moved: no model can do better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """One probe. Made by `probe`, taken by HealthWatch."""

    error_ratio: float  # geometric mean over observation keys and predicted rows; below 1 beats copying
    by_row: dict[int, float]  # the same at predicted row 1, 5, 15, ...


def probe(
    agent: Predictor, sequence: Sequence, *, sequences: int, context: int, horizon: int, seed: int
) -> ProbeResult | None:
    """Predict up to `horizon` rows of the first `sequences` of a batch after `context` seen ones.

    None when nothing can be predicted: rows too short, or nothing moved.
    """
    rows = sequence.shape[1] - sequence.context
    if rows <= context:
        return None
    part = _corner(sequence, sequences, sequence.context + min(rows, context + horizon))
    return _judged(open_loop(agent, part, context=context, seed=seed))


def _corner(sequence: Sequence, count: int, rows: int) -> Sequence:
    """The first `rows` of the first `count` sequences."""
    columns = {key: np.ascontiguousarray(value[:count, :rows]) for key, value in sequence.columns.items()}
    ids = sequence.ids
    few = SequenceIds(shard=ids.shard[:count], stream=ids.stream[:count], start=ids.start[:count])
    return replace(sequence, columns=columns, ids=few, weights=None)


def _judged(report: OpenLoop) -> ProbeResult | None:
    logs: list[list[float]] = [[] for _ in report.valid]  # per predicted row, one entry per key
    for key, error in report.error.items():
        if key == "reward":  # rare rewards are copied without error almost everywhere
            continue
        copied = report.copy_error[key]
        for row, valid in enumerate(report.valid):
            if valid and copied[row] > LEAST_ERROR:
                logs[row].append(math.log(max(float(error[row]), LEAST_ERROR) / float(copied[row])))
    means = {row + 1: sum(found) / len(found) for row, found in enumerate(logs) if found}
    if not means or not all(map(math.isfinite, means.values())):
        return None
    shown = {row: math.exp(means[row]) for row in (1, 5, 15, 50) if row in means}
    return ProbeResult(error_ratio=math.exp(sum(means.values()) / len(means)), by_row=shown)
