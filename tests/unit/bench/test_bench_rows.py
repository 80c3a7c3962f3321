import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main, names
from bench.load import Load, Samples, repeat

ROOT = Path(__file__).resolve().parents[3]
KEYS = {"bench", "case", "metric", "value", "unit", "ratio", "ratio_to", "n", "spread", "foreign_load"}


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def printed_rows(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row.keys() == KEYS for row in rows)
    return rows


def test_median_and_spread_are_those_of_the_samples():
    samples = Samples(values=(1.0, 2.0, 3.0, 4.0, 100.0), foreign_load=0.1, cpu_per_wall=1.0)
    assert samples.median == 3.0
    assert samples.spread == pytest.approx((4.0 - 2.0) / 3.0)
    row = samples.row("b", "c", "m", "ms", ratio=0.5, ratio_to="memcpy")
    assert (row.value, row.n, row.ratio, row.foreign_load) == (3.0, 5, 0.5, 0.1)


def test_one_sample_has_no_spread():
    assert Samples(values=(2.0,), foreign_load=0, cpu_per_wall=0).spread == 0.0


def test_measuring_ends_between_least_and_most():
    assert len(repeat(lambda: 1.0, seconds=0.0, least=7).values) == 7
    assert len(repeat(lambda: 1.0, seconds=60.0, least=1, most=12).values) == 12


def test_our_own_work_is_counted_as_ours():
    begun = time.process_time()
    with Load() as load:
        while time.process_time() - begun < 0.2:
            sum(range(10_000))
    assert load.own >= 0.15
    assert load.foreign >= 0.0


def test_work_of_our_children_is_our_own():
    program = "s = 0\nfor i in range(4_000_000): s += i"
    with Load() as load:
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert load.own > 0.05


def test_every_bench_of_the_performance_page_exists():
    assert {"learner", "weights", "collect"} <= set(names())


def test_an_unknown_bench_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["speed"])
    assert ended.value.code == 2
    assert "learner" in capsys.readouterr().err


def test_the_weights_bench_prints_its_rows(capsys: pytest.CaptureFixture[str]):
    assert main(["weights", "--json", "--mib", "1", "--seconds", "0"]) == 0
    rows = printed_rows(capsys)
    assert [row["metric"] for row in rows] == ["loopback_rate", "stream_rate", "publish_rate"]
    assert rows[1]["ratio_to"] == "loopback_socket"
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.parametrize("case", ["vector", "image"])
def test_the_learner_bench_prints_its_rows(capsys: pytest.CaptureFixture[str], case: str):
    size = ["--size", "nano", "--batch", "2", "--length", "4", "--seconds", "0", "--threads", "1"]
    assert main(["learner", "--json", "--case", case, *size]) == 0
    rows = {row["metric"]: row for row in printed_rows(capsys)}
    assert rows["update_ms"]["ratio_to"] == "matmul_peak"
    assert rows["gflop"]["value"] > 0
    assert rows["params"]["value"] > 10_000
    assert rows["policy_ms"]["case"] == f"{case}-n16"


def test_the_learner_bench_needs_neither_ray_nor_environments():
    program = (
        "import sys\n"
        "from bench.__main__ import main\n"
        "import bench.learner\n"
        "print([m for m in ('ray', 'envpool', 'gymnasium', 'zarr') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr
