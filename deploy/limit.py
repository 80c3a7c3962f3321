"""Changes the train ratio of a run while it runs: `dreamfleet replay limit` asks, the learner role answers.

Question and answer are files of the run directory, like the request for a checkpoint. What was accepted is
kept there too and holds over every resume, until the run is resumed with other settings in its recipe.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy import assemble
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory, read_json
from replay.limiter import RateLimiter
from system.errors import ConfigError, DeadlineError, IntegrityError

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitChange:
    """Made by `ask_limit`, for the person who asked."""

    run_dir: str
    train_ratio: float
    tolerance: int | None  # None: fits the traffic
    applied: bool  # False: kept for the next start

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        band = "fitted to the traffic" if self.tolerance is None else f"{self.tolerance} rows"
        when = "holds now" if self.applied else "holds from the next start on"
        return f"{self.run_dir}: train ratio {self.train_ratio:g}, tolerance {band}; {when}"


def ask_limit(
    path: Path, *, train_ratio: float | None = None, tolerance: int | None = None, timeout: float = 30.0
) -> LimitChange:
    """Change the limits of the run at `path`, running or not; what is None stays.

    Raises: ConfigError with the reason when that would deadlock or there is nothing to change; DeadlineError
    when the learner did not answer within `timeout` seconds (the request stays).
    """
    if train_ratio is None and tolerance is None:
        raise ConfigError("nothing to change; give --train-ratio, --tolerance or both")
    run_dir = RunDirectory(path)
    config = RunConfig.model_validate(run_dir.config())
    keeper = LimitKeeper(run_dir, config, _limiter(config))
    keeper.restore()
    asked = {"train_ratio": train_ratio, "tolerance": tolerance}
    keeper.check(asked)
    if not _learner_lives(run_dir):
        kept = keeper.keep(asked)
        run_dir.event("limit changed", **kept, applied=False)
        return LimitChange(run_dir=str(path), applied=False, **kept)
    token = uuid.uuid4().hex
    run_dir.write_json(run_dir.limit_request, {"token": token, **asked})
    answer = _await_answer(run_dir, token, timeout)
    if answer.get("refused"):
        raise ConfigError(f"the learner refused: {answer['refused']}")
    return LimitChange(
        run_dir=str(path), applied=True, train_ratio=answer["train_ratio"], tolerance=answer["tolerance"]
    )


class LimitKeeper:
    """The learner's side: takes requests, and remembers what was granted."""

    def __init__(self, run_dir: RunDirectory, config: RunConfig, limiter: RateLimiter) -> None:
        self._run_dir, self._limiter = run_dir, limiter
        self._base = {"train_ratio": config.replay.train_ratio, "tolerance": config.replay.tolerance}
        self._now: dict[str, Any] = dict(self._base)

    def restore(self) -> None:
        """Take up what was granted before, unless the run's own settings changed since.

        Raises: IntegrityError when the file is damaged.
        """
        path = self._run_dir.limit_file
        if not path.exists():
            return
        kept = read_json(path)
        try:
            if kept["base"] != self._base:
                return
            now = {name: kept[name] for name in self._base}
            self._limiter.adjust(train_ratio=now["train_ratio"], tolerance_rows=now["tolerance"])
        except (KeyError, TypeError, ConfigError) as error:
            raise IntegrityError(
                f"{path} does not hold limits this run can take ({error!r}); remove it, then ask again"
            ) from error
        self._now = now

    def poll(self) -> None:
        """Answer a request if there is one: every outcome is an event."""
        path = self._run_dir.limit_request
        if not path.exists():
            return
        asked: Any = {}
        try:
            asked = read_json(path)
            path.unlink(missing_ok=True)
            self.check(asked)
        except (ConfigError, IntegrityError) as error:
            path.unlink(missing_ok=True)
            self._answer(asked, refused=str(error))
            return
        self._limiter.request(train_ratio=asked.get("train_ratio"), tolerance_rows=asked.get("tolerance"))
        kept = self.keep(asked)
        self._run_dir.event("limit changed", **kept, applied=True)
        self._run_dir.write_json(self._run_dir.limit_answer, {"token": asked.get("token"), **kept})

    def check(self, asked: Any) -> None:
        """Raises: ConfigError when the limiter would deadlock, or the request is none."""
        if not isinstance(asked, dict):
            raise ConfigError(f"a request for limits must be an object, is {asked!r}")
        ratio, tolerance = asked.get("train_ratio"), asked.get("tolerance")
        if not isinstance(ratio, float | int | None) or not isinstance(tolerance, int | None):
            raise ConfigError(f"train_ratio ({ratio!r}) and tolerance ({tolerance!r}) must be numbers")
        self._limiter.check_adjust(train_ratio=ratio, tolerance_rows=tolerance)

    def keep(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Write down what holds from now on; return it."""
        self._now |= {name: asked[name] for name in self._base if asked.get(name) is not None}
        self._run_dir.write_json(self._run_dir.limit_file, {**self._now, "base": self._base})
        return dict(self._now)

    def _answer(self, asked: Any, refused: str) -> None:
        self._run_dir.event("limit refused", reason=refused, asked=asked)
        self._run_dir.write_json(
            self._run_dir.limit_answer,
            {"token": asked.get("token") if isinstance(asked, dict) else None, "refused": refused},
        )


def _limiter(config: RunConfig) -> RateLimiter:
    limiter = assemble.rate_limiter(config)
    limiter.check_update(config.batch_rows)
    return limiter


def _learner_lives(run_dir: RunDirectory) -> bool:
    return any(
        record["role"] == "learner"
        and record["state"] in ("starting", "running")
        and psutil.pid_exists(int(record["pid"]))
        for record in run_dir.role_records()
    )


def _await_answer(run_dir: RunDirectory, token: str, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            answer = json.loads(run_dir.limit_answer.read_text())
        except (FileNotFoundError, ValueError):
            answer = {}
        if answer.get("token") == token:
            return answer
        time.sleep(POLL_SECONDS)
    raise DeadlineError(
        f"the learner of {run_dir.path} did not answer within {timeout:g} s; the request stays and is taken "
        "when its current update ends: see events.jsonl"
    )
