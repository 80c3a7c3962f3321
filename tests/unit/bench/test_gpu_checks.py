"""What the GPU checks do that can be tried without a GPU: arithmetic, cases, one row on the CPU."""

import argparse
import json
from pathlib import Path

import pytest

from bench import gpu
from bench.proof import CASES, DMC_GATES, TRAINING_STEPS, training_return
from bench.report import RESULTS
from deploy.run_config import compose


def test_overlapping_kernels_are_counted_once() -> None:
    assert gpu.union([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 6.0)]) == 4.0
    assert gpu.union([]) == 0.0


def test_an_update_is_timed_on_the_device_asked_for() -> None:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    tiny = ["--size", "nano", "--batch", "2", "--length", "4", "--updates", "1", "--seconds", "0"]
    options = parser.parse_args(["--device", "cpu", *tiny, "--set", "horizon=2"])
    time, cores = gpu.rows(options)
    assert (time.metric, time.unit, cores.metric) == ("update_ms", "ms", "cpu_per_wall")
    assert time.case == "vector-nano-fp32"
    assert time.value > 0.0


@pytest.mark.parametrize("task", DMC_GATES)
def test_control_suite_gates_run_the_official_protocol_for_50000_steps(task: str) -> None:
    case = CASES[f"dmc_{task}"]
    config, _ = compose(case.recipe, case.assignments)
    assert config.env.name == f"dmc:{task}"
    assert config.backend == "local"
    assert config.learner.settings["size"] == "size1m"
    assert config.planned_updates == pytest.approx(50_000 - config.prefill)
    assert case.least_training == DMC_GATES[task]
    assert len(case.seeds) == 3


def test_training_return_is_averaged_over_the_window_of_the_reference(tmp_path: Path) -> None:
    reference = json.loads((RESULTS / "reference-dmc.json").read_text())
    assert reference["window"] == TRAINING_STEPS
    (tmp_path / "metrics").mkdir()
    points = [{"env_steps": steps, "return": steps / 1000} for steps in (1000, 30_000, 32_000, 48_000)]
    lines = "".join(json.dumps(point) + "\n" for point in points)
    (tmp_path / "metrics" / "episodes.jsonl").write_text(lines)
    assert training_return(tmp_path, 50_000) == pytest.approx((32 + 48) / 2)
    assert training_return(tmp_path, 100_000) is None
