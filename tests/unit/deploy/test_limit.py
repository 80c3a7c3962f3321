import json
import os
import threading
from pathlib import Path

import pytest

from deploy import assemble
from deploy.limit import LimitKeeper, ask_limit
from deploy.run_config import RunConfig, compose
from deploy.run_dir import RunDirectory
from replay.limiter import RateLimiter
from system.errors import ConfigError, DeadlineError


def run(tmp_path: Path, *settings: str) -> tuple[RunDirectory, RunConfig]:
    config, _ = compose("cartpole", [f"root={tmp_path}", "name=r", *settings])
    run_dir = RunDirectory(config.directory)
    run_dir.create().release()
    run_dir.write_json(run_dir.config_file, config.model_dump(mode="json"))
    return run_dir, config


def limiter(config: RunConfig) -> RateLimiter:
    it = assemble.rate_limiter(config)
    it.check_update(config.batch_rows)
    return it


def learner_says(run_dir: RunDirectory, state: str) -> None:
    record = {"role": "learner", "index": 0, "incarnation": 1, "state": state, "pid": os.getpid()}
    run_dir.write_json(run_dir.status / "learner-0.json", record)


def test_a_stopped_run_keeps_the_new_ratio_for_its_next_start(tmp_path: Path) -> None:
    run_dir, config = run(tmp_path)
    change = ask_limit(run_dir.path, train_ratio=8.0)
    assert not change.applied
    it = limiter(config)
    LimitKeeper(run_dir, config, it).restore()
    assert it.train_ratio == 8.0
    assert it.paced
    assert [e["event"] for e in run_dir.events()] == ["limit changed"]


def test_settings_of_the_recipe_changed_since_win(tmp_path: Path) -> None:
    run_dir, _ = run(tmp_path)
    ask_limit(run_dir.path, train_ratio=8.0)
    _, config = run(tmp_path, "replay.train_ratio=16")
    it = limiter(config)
    LimitKeeper(run_dir, config, it).restore()
    assert it.train_ratio == 16.0


def test_a_running_learner_answers_and_the_change_is_an_event(tmp_path: Path) -> None:
    run_dir, config = run(tmp_path)
    learner_says(run_dir, "running")
    it = limiter(config)
    keeper = LimitKeeper(run_dir, config, it)
    done = threading.Event()

    def learner() -> None:
        while not done.wait(0.005):
            keeper.poll()

    thread = threading.Thread(target=learner)
    thread.start()
    try:
        change = ask_limit(run_dir.path, train_ratio=4.0, tolerance=100_000, timeout=30.0)
    finally:
        done.set()
        thread.join()
    assert change.applied
    it.observe(0, 0, 0)
    assert (it.train_ratio, it.tolerance_rows, it.paced) == (4.0, 100_000, False)
    assert not run_dir.limit_request.exists()
    again = limiter(config)
    LimitKeeper(run_dir, config, again).restore()
    assert (again.train_ratio, again.tolerance_rows) == (4.0, 100_000)


def test_what_would_deadlock_is_refused_with_the_reason(tmp_path: Path) -> None:
    run_dir, _ = run(tmp_path)
    with pytest.raises(ConfigError, match="learner and actors would wait for each other"):
        ask_limit(run_dir.path, train_ratio=1.0, tolerance=1)
    with pytest.raises(ConfigError, match="train_ratio"):
        ask_limit(run_dir.path, train_ratio=0.0)
    with pytest.raises(ConfigError, match="nothing to change"):
        ask_limit(run_dir.path)
    assert not run_dir.limit_file.exists()


def test_the_learner_refuses_what_was_put_there_by_hand(tmp_path: Path) -> None:
    run_dir, config = run(tmp_path)
    it = limiter(config)
    keeper = LimitKeeper(run_dir, config, it)
    before = (it.train_ratio, it.tolerance_rows)
    for text in ('{"train_ratio": -1, "tolerance": null}', '{"train_ratio": "x", "tolerance": 1}', "{", "[]"):
        run_dir.limit_request.write_text(text)
        keeper.poll()
        it.observe(0, 0, 0)
        assert (it.train_ratio, it.tolerance_rows) == before
        assert json.loads(run_dir.limit_answer.read_text())["refused"]
        assert not run_dir.limit_request.exists()
    assert [e["event"] for e in run_dir.events()] == ["limit refused"] * 4


def test_a_request_that_names_only_the_ratio_changes_only_that(tmp_path: Path) -> None:
    run_dir, config = run(tmp_path)
    it = limiter(config)
    tolerance = it.tolerance_rows
    run_dir.limit_request.write_text('{"train_ratio": 77}')
    LimitKeeper(run_dir, config, it).poll()
    it.observe(0, 0, 0)
    assert (it.train_ratio, it.tolerance_rows) == (77.0, tolerance)


def test_a_silent_learner_is_reported_and_the_request_stays(tmp_path: Path) -> None:
    run_dir, _ = run(tmp_path)
    learner_says(run_dir, "running")
    with pytest.raises(DeadlineError, match="did not answer"):
        ask_limit(run_dir.path, train_ratio=4.0, timeout=0.01)
    assert run_dir.limit_request.exists()
