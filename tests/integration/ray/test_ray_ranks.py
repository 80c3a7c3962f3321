"""Learner ranks as Ray actors: a run trains on after one was killed and after one was stopped."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.ray_session import RaySession
from deploy.run_config import compose

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(400)]


def until(session: RaySession, reached: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, list(session.run_dir.events())[-3:]
        session.step()


def test_run_trains_on_after_a_rank_was_killed_and_after_one_was_stopped(
    small: tuple[str, ...], tmp_path: Path, leaves_nothing: None
):
    config, layers = compose("cartpole", [*small, "learner.ranks=2", f"root={tmp_path}"])
    session = RaySession(config, layers, resume="never")

    def record(key: str) -> dict:
        records = (r for r in session.run_dir.role_records() if f"{r['role']}-{r['index']}" == key)
        return next(records, {"incarnation": 0, "payload": {}})

    def trains(life: int) -> bool:
        zero, one = record("learner-0"), record("learner-1")
        lives = zero["incarnation"] == one["incarnation"] == life
        return lives and zero["payload"].get("updates", 0) > 0 and one["payload"].get("served", 0) > 0

    try:
        session.start()
        until(session, lambda: trains(1))
        for life, number in ((2, signal.SIGKILL), (3, signal.SIGSTOP)):
            begun = time.time()
            os.kill(record("learner-1")["pid"], number)
            until(session, lambda: trains(life))  # noqa: B023
            lost = [e for e in session.run_dir.events() if e["event"] == "role lost" and e["time"] > begun]
            assert lost[0]["role"].startswith("learner")
        session.halt()
    finally:
        session.close()
