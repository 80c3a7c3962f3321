"""A run is a directory: resolved config, checkpoints, replay, metrics, events, and who is alive.

One process at a time drives a run (flock). Every JSON file is written to a temporary name and
renamed, so a reader or a kill -9 never meets half a file.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from system.errors import ConfigError, IntegrityError, PreflightError
from system.specs import EnvSpec


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn an operating-system error of the body, which writes `path`, into a PreflightError."""
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"cannot write {path} ({error.strerror}); free space there and run the same command again, or "
            "choose another place with --set root=DIR"
        ) from error


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` in one step. Raises: PreflightError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with written(path):
        try:
            temporary.write_text(text)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file. Raises: PreflightError when they cannot be written."""
    with written(path), path.open("a") as file:
        file.write(text)


def read_json(path: Path) -> Any:
    """Raises: IntegrityError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} is unreadable ({error}); restore it or start a new run with --set name=NEW"
        ) from error


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; lines cut off by a kill are skipped."""
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: Any = None

    checkpoints = property(lambda self: self.path / "checkpoints")
    replay = property(lambda self: self.path / "replay")
    metrics = property(lambda self: self.path / "metrics")
    logs = property(lambda self: self.path / "logs")
    status = property(lambda self: self.path / "status")
    config_file = property(lambda self: self.path / "run.json")
    env_file = property(lambda self: self.path / "env_spec.json")
    summary_file = property(lambda self: self.path / "summary.json")
    incarnations_file = property(lambda self: self.path / "incarnations.json")
    checkpoint_request = property(lambda self: self.path / "checkpoint.asked")
    """Whoever creates this file gets a checkpoint: the learner takes the file away and saves."""
    limit_request = property(lambda self: self.path / "limit.asked")
    """Other limits somebody asked the learner for; `deploy.limit`."""
    limit_answer = property(lambda self: self.path / "limit.answer")
    limit_file = property(lambda self: self.path / "limit.json")
    """Limits that were granted while the run ran, over those of the recipe."""

    @property
    def exists(self) -> bool:
        return self.config_file.is_file()

    def create(self) -> RunDirectory:
        """Make the directories and take the run's lock.

        Raises: PreflightError without permission or space; ConfigError when another process drives it.
        """
        try:
            for part in (self.path, self.checkpoints, self.replay, self.metrics, self.logs, self.status):
                part.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise PreflightError(
                f"cannot create run directory {self.path} ({error.strerror}); choose a writable place with "
                "--set root=DIR"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ConfigError(
                f"run {self.path} is driven by another process; stop it first or use --set name=OTHER"
            ) from error
        self._lock = lock
        return self

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_json(self, path: Path, value: Any) -> None:
        write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def event(self, name: str, **details: Any) -> None:
        """Append one lifecycle event with its reason to events.jsonl."""
        line = json.dumps({"time": time.time(), "event": name, **details}, default=str)
        append_text(self.path / "events.jsonl", line + "\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """The lifecycle events, oldest first."""
        return json_lines(self.path / "events.jsonl")

    def role_records(self) -> Iterator[dict[str, Any]]:
        """The newest word of every role that ever reported here."""
        for path in sorted(self.status.glob("*.json")):
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # removed by a launch just now, or damaged
            if isinstance(record, dict) and record.keys() >= {"role", "index", "incarnation", "state", "pid"}:
                yield record

    def next_incarnation(self, role: str, index: int) -> int:
        """Count one more life of a role; grows over restarts and resumes, so a zombie is recognised."""
        counts = self.incarnations()
        key = f"{role}-{index}"
        counts[key] = counts.get(key, 0) + 1
        self.write_json(self.incarnations_file, counts)
        return counts[key]

    def incarnations(self) -> dict[str, int]:
        """Lives of each role so far, by role and index. Raises: IntegrityError when the file is damaged."""
        return read_json(self.incarnations_file) if self.incarnations_file.exists() else {}

    def config(self) -> Mapping[str, Any]:
        """The resolved config this run was started with. Raises: ConfigError when this is no run."""
        if not self.exists:
            raise ConfigError(
                f"{self.path} is not a run directory (no run.json); give the path printed by train"
            )
        values = read_json(self.config_file)
        if not isinstance(values, dict):
            raise _foreign(self.config_file, f"it holds a {type(values).__name__}, no settings")
        return typing.cast("dict[str, Any]", values)

    def env_spec(self) -> EnvSpec:
        """What the run's environment shows and takes. Raises: IntegrityError when the file is not that."""
        try:
            return EnvSpec.from_json(read_json(self.env_file))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _foreign(self.env_file, repr(error)) from error

    @property
    def holds_work(self) -> bool:
        """True once there is a checkpoint or a replay table; before, starting anew loses nothing."""
        return any(self.checkpoints.glob("[0-9]*")) or (self.replay / "table.json").exists()


def _foreign(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not what train wrote ({why}); restore it or start anew with --set name=NEW"
    )
