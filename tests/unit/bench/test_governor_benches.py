import json
import subprocess

import pytest

from bench import cgroup
from bench.__main__ import main
from bench.cgroup import MemoryGroup
from bench.ratio import Mark, window_ratios
from system.errors import PreflightError


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {row["metric"]: row["value"] for row in rows}


def test_windows_end_at_every_mark_and_span_the_asked_seconds() -> None:
    marks = [Mark(time=float(t), inserted=10 * t, trained=40 * t + (t == 7)) for t in range(10)]
    found = window_ratios(marks, 3)
    assert [end for end, _ in found] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert [ratio for _, ratio in found] == pytest.approx([4, 4, 4, 4, 4 + 1 / 30, 4, 4])


def test_windows_without_rows_are_left_out() -> None:
    marks = [Mark(time=float(t), inserted=5, trained=t) for t in range(5)]
    assert window_ratios(marks, 2) == []


@pytest.mark.drill
def test_the_ratio_bench_runs_real_shards_and_writers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seconds", "3", "--window", "2", "--warmup", "0.2", "--shards", "2", "--writers", "2"]
    assert main(["ratio", "--json", *arguments]) == 0
    values = printed(capsys)
    assert values["windows"] > 0
    assert values["insert_rate"] > 0
    assert values["worst_off"] < 100
    assert values["shards_killed"] == 1


def test_a_machine_without_memory_groups_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_parents", lambda: iter(()))
    with pytest.raises(PreflightError, match="no cgroup mounted"):
        MemoryGroup(1 << 28)


def test_a_memory_group_counts_and_goes_away() -> None:
    try:
        group = MemoryGroup(1 << 28)
    except PreflightError as error:
        pytest.skip(str(error))
    with group:
        assert group.path.is_dir()
        subprocess.run(["true"], check=True, preexec_fn=group.enter)
        now = group.read()
        assert now.oom_kills == 0
        assert now.usage < 1 << 28
    assert not group.path.exists()


@pytest.mark.drill
def test_the_memory_bench_runs_a_replay_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--memory-mib", "320", "--times", "0.1", "--seconds", "2", "--window", "1", "--warmup", "0"]
    code = main(["bounded_memory", "--json", "--update-ms", "20", "--segment-rows", "64", *arguments])
    if code == PreflightError.exit_code:
        pytest.skip("no writable memory controller here")
    assert code == 0
    values = printed(capsys)
    assert values["oom_kills"] == 0
    assert 0 < values["anon_max"] < 320
    assert values["usage_max"] <= 320.5
    assert values["insert_rate"] > 0
