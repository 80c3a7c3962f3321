"""What only a trained model passes: CartPole learned offline from real rows, judged beside the truth."""

import argparse

import pytest

from bench.world_model import figures, trial

pytestmark = [pytest.mark.learning, pytest.mark.drill, pytest.mark.timeout(1800)]


def test_a_trained_cartpole_model_beats_copying_for_fifteen_steps() -> None:
    options = argparse.Namespace(rows=20_000, updates=3_000)
    reports = trial(0, options).reports
    trained, untrained, oracle = (reports[case] for case in ("trained", "untrained", "oracle"))
    assert trained.passed, trained.text()
    assert trained.main.useful_horizon >= 15
    assert oracle.passed, oracle.text()
    assert untrained.sound, untrained.text()
    assert not any(check.passed for check in untrained.checks if check.name in untrained.scores)
    told = {case: figures(report) for case, report in reports.items()}
    for metric in ("error_15", "one_step_error"):
        values = [told[case][metric][0] for case in ("oracle", "trained", "untrained")]
        assert values == sorted(values), metric
