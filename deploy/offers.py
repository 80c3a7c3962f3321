"""Roles that somebody else starts: the backend lays out what is to be done, a process comes and takes it.

How torchrun's processes become the learner ranks of a run: `LocalFleet` writes an offer for each life of each
rank, `deploy.torchrun` claims it. An offer is claimed once; who comes later waits for the next life.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from deploy.roles import RoleSpec
from deploy.run_dir import written

POLL_SECONDS = 0.1


def _path(run_dir: Path, key: str) -> Path:
    return run_dir / "offers" / f"{key}.json"


def claim(run_dir: Path, key: str, goes_on: Callable[[], bool]) -> RoleSpec | None:
    """Wait for an offer and take it; None when goes_on() says no first."""
    taken = _path(run_dir, key).with_suffix(f".{os.getpid()}")
    while goes_on():
        try:
            _path(run_dir, key).rename(taken)
        except FileNotFoundError:
            time.sleep(POLL_SECONDS)
            continue
        spec = RoleSpec.from_json(taken.read_text())
        taken.unlink()
        return spec
    return None


class OfferedRole:
    """One life of a role in a process that is not ours. Speaks as subprocess.Popen does to `LocalFleet`."""

    def __init__(self, run_dir: Path, spec: RoleSpec) -> None:
        self._run_dir, self._spec = run_dir, spec
        self._offer = _path(run_dir, spec.key)
        self._code: int | None = None
        temporary = self._offer.with_suffix(".tmp")
        with written(self._offer):
            self._offer.parent.mkdir(exist_ok=True)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it holds a secret
            with os.fdopen(handle, "w") as file:
                file.write(spec.to_json())
            temporary.rename(self._offer)

    @property
    def taken(self) -> bool:
        """Whether a process came for it, or nobody can any more: until then there is nobody to be silent."""
        return self._code is not None or not self._offer.exists()

    @property
    def pid(self) -> int:
        """Of who took it; 0 before."""
        record = self._record()
        return int(record["pid"]) if record else 0

    def _record(self) -> dict[str, Any]:
        """The newest word of this life; empty before the first."""
        try:
            record = json.loads((self._run_dir / "status" / f"{self._spec.key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return record if record.get("incarnation") == self._spec.incarnation else {}

    def _process(self) -> psutil.Process | None:
        """Who took it, while it lives. A process that began after its last word is a stranger who was given
        the same number.
        """
        record = self._record()
        with contextlib.suppress(psutil.NoSuchProcess):
            if record and (found := psutil.Process(int(record["pid"]))).create_time() < record["time"]:
                return found if found.status() != psutil.STATUS_ZOMBIE else None
        return None

    def poll(self) -> int | None:
        """None while it waits for a process or has one; else 0 when nobody took it, or 1: no exit code is
        known of a process that is not ours. What it said itself counts more.
        """
        if self._code is None and self.pid and self._process() is None:
            self._code = 1
        return self._code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        if self._code is None and not self.pid:  # who took the offer ended before it said a word
            self._code = 1

    def _send(self, number: signal.Signals) -> None:
        try:
            self._offer.unlink()
        except FileNotFoundError:
            if process := self._process():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        else:
            self._code = 0

    def wait(self, timeout: float) -> int:
        """Raises: subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._spec.key, timeout)
            time.sleep(POLL_SECONDS)
        return code
