"""The harness on a model that is of no family: whatever it predicts, whatever it is shown, however short."""

import json

import numpy as np
import pytest
import torch

from learner.evaluation.channels import channels
from learner.evaluation.harness import evaluate_model
from learner.evaluation.openloop import open_loop
from learner.health.probe import probe
from system.experience import Sequence, SequenceIds
from tests.unit.learner.linear_world import LinearModel, linear_rows

ALL = frozenset({"step", "decode", "reward", "cont"})


class OneBatch:
    """An agent of a given model whose sequences are all the same rows."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def prepare(self, sequence):
        del sequence
        return self.rows.batch, self.rows.start


def fitted(caps=ALL):
    return LinearModel(caps).fit(linear_rows(32, 40, 1, seed=3))


def push(state, h):
    """A policy: against the second number, harder from step to step."""
    return torch.stack([-state["feat"][:, 1] / (h + 1), state["feat"][:, 0]], -1).clamp(-1, 1)


def test_model_that_was_fitted_to_its_world_passes_and_one_that_was_not_fails() -> None:
    model, judge = fitted(), fitted()
    report = evaluate_model(model, linear_rows(24, 24, 4), seed=0, reference=judge, policy=push)
    assert report.passed, report.text()
    assert report.main.useful_horizon == 20
    assert report.counterfactual is not None
    assert report.counterfactual.retrieval == 1.0
    assert report.plan is not None
    assert report.plan.gap == pytest.approx(0.0, abs=1e-4)
    wrong = LinearModel(ALL)
    wrong.weight = 0.5 * torch.eye(5, 3)
    report = evaluate_model(wrong, linear_rows(24, 24, 4), seed=0, reference=judge, policy=push)
    assert {check.name for check in report.checks if not check.passed} == {
        "listens/action", "useful_horizon", "action_shuffle", "counterfactual",
    }  # fmt: skip


@pytest.mark.parametrize(
    "caps", [ALL, {"step", "decode"}, {"step"}, {"decode", "reward"}, {"decode", "cont"}, set()], ids=str
)
def test_report_holds_what_the_model_can_do_and_asks_for_no_more(caps) -> None:
    model = fitted(frozenset(caps))
    rows = linear_rows(8, 14, 4)
    report = evaluate_model(model, rows, seed=0, reference=fitted(), policy=push)
    assert report.sound, report.text()
    assert channels(model).keys() <= report.curves.keys()
    assert ("reward" in report.curves, "cont" in report.curves) == ("reward" in caps, "cont" in caps)
    assert (report.plan is not None) == ("reward" in caps)
    assert ("agreement/step" in {check.name for check in report.checks}) == ("step" in caps)
    json.dumps(report.to_json(), allow_nan=False)
    loop = open_loop(OneBatch(model, rows), None, context=4, seed=0)
    assert set(loop.error) == {
        *(("box", "class", "image", "still") if "decode" in caps else ()),
        *(("reward",) if "reward" in caps else ()),
    }
    assert set(loop.images) == ({"image"} if "decode" in caps else set())


def test_probe_has_nothing_to_say_of_a_model_that_decodes_nothing() -> None:
    rows = linear_rows(4, 12, 5)
    zeros = np.zeros(4, np.int32)
    sequence = Sequence(
        columns={"reward": rows.batch["reward"].numpy()},
        ids=SequenceIds(shard=zeros, stream=zeros, start=zeros.astype(np.int64)),
        context=0,
    )
    told = [
        probe(OneBatch(fitted(caps), rows), sequence, sequences=4, context=5, horizon=7, seed=0)
        for caps in (ALL, frozenset({"step"}))
    ]
    assert told[0] is not None
    assert told[0].error_ratio < 0.05
    assert told[1] is None


@pytest.mark.parametrize(
    ("size", "time", "seen", "ends"),
    [(16, 30, 3, 0.5), (2, 3, 1, 0.0), (2, 3, 2, 1.0), (5, 12, 5, 0.9), (64, 20, 10, 0.05)],
)
def test_episodes_of_any_length_can_be_judged(size: int, time: int, seen: int, ends: float) -> None:
    """Ends inside of the horizon, episodes of one row, and constant entries divide by nothing."""
    report = evaluate_model(fitted(), linear_rows(size, time, seen, ends=ends), seed=0)
    assert report.sound, report.text()
    assert report.main.counted <= time - seen
    assert (report.main.counted == 0) == (ends == 1.0)
    assert report.main.useful_horizon == report.main.counted
    assert report.passed == (ends < 1.0), "nothing to judge is not passed"
    for name, curve in report.curves.items():
        assert np.isfinite([curve.model, curve.copy, curve.mean, curve.one_step]).all(), name


@pytest.mark.parametrize("where", ["box", "action"])
def test_model_that_says_nan_fails_and_the_report_can_still_be_written(where: str) -> None:
    model = fitted()
    model.weight[0 if where == "box" else 3] = float("nan")
    report = evaluate_model(model, linear_rows(8, 12, 3), seed=0, reference=fitted(), policy=push)
    assert not report.passed
    assert not report.sound
    assert report.main.useful_horizon == 0
    json.dumps(report.to_json(), allow_nan=False)
    assert report.text()
