"""Other projects' learners are measured only beside equal work, and their rows say how they compare."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from bench import learner_peers
from bench.learner import _equal_work, add_arguments
from bench.peers import learner_load


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_only_equal_work_is_compared() -> None:
    assert _equal_work(options())
    for change in (["--size", "nano"], ["--batch", "8"], ["--length", "32"], ["--dtype", "bf16"]):
        assert not _equal_work(options(*change))
    assert not options("--no-peers").peers


def test_the_load_is_that_of_our_own_bench() -> None:
    defaults = options()
    assert (defaults.batch, defaults.length) == (learner_load.BATCH, learner_load.LENGTH)
    rows = learner_load.made_up("image", 3)
    assert rows["obs"].shape == (16, 3, 64, 64, 3)
    assert rows["action"].sum(-1).tolist() == [[1.0] * 3] * 16


def test_a_peer_that_computes_nonsense_has_no_figures() -> None:
    with pytest.raises(ArithmeticError, match="nan"):
        learner_load.time_updates("peer", "vector", lambda: float("nan"), 1, 0.0)


def test_rows_of_a_peer_tell_how_many_of_our_updates_fit_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    row = {"bench": "learner", "case": "vector x", "metric": "update_ms", "value": 600.0, "unit": "ms"}
    script.write_text(f"#!{sys.executable}\nprint('noise')\nprint('''{json.dumps(row)}''')\n")
    script.chmod(0o755)
    monkeypatch.setattr(learner_peers, "PEERS", {"one": lambda: script})
    (found,) = learner_peers.peer_rows("vector", 1, 0.0, 200.0)
    assert (found.value, found.ratio, found.ratio_to) == (600.0, 3.0, "dreamfleet")
