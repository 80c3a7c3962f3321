"""The table of docs/reliability.md is made of the figures, and of nothing else."""

import json
from pathlib import Path

from bench import chaos
from bench.chaos import FAULTS, Trial
from bench.report import between


def trial(seconds: float, repeated: int = 0, lost: int = 0) -> Trial:
    return Trial(
        recovery_seconds=seconds,
        acknowledged=1000,
        lost=lost,
        doubled=0,
        missing=0,
        updates_repeated=repeated,
        foreign_load=0.1,
    )


def test_table_has_a_line_per_fault_with_median_worst_and_sums(tmp_path: Path) -> None:
    trials = {fault: [trial(2.0), trial(9.0), trial(3.0)] for fault in FAULTS}
    trials["learner"] = [trial(4.0, repeated=7), trial(5.0, repeated=12, lost=1), trial(6.0, lost=2)]
    chaos.write_results(tmp_path / "chaos.json", trials)
    data = json.loads((tmp_path / "chaos.json").read_text())
    lines = chaos.table(data).splitlines()
    assert "| one actor | 3 | 3.0 | 9.0 | 1000 | 0 | 0 | 0 |" in lines
    assert "| learner | 3 | 5.0 | 6.0 | 1000 | 3 | 0 | 12 |" in lines
    assert sum(line.startswith("|") for line in lines) == 2 + len(FAULTS)


def test_reliability_page_shows_the_kept_figures() -> None:
    page = chaos.RELIABILITY.read_text()
    assert page.count("<!-- chaos begin -->") == page.count("<!-- chaos end -->") == 1
    results = chaos.RESULTS / "chaos.json"
    if results.exists():
        assert between(page, "chaos", chaos.table(json.loads(results.read_text()))) == page
