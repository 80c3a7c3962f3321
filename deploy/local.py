"""Backend `local`: each role is a plain child process; no Ray anywhere.

Also how a learner reaches a bare GPU box. Status crosses by small files in run/status.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from deploy.fleet import RoleStatus
from deploy.offers import OfferedRole
from deploy.roles import RoleSpec
from deploy.run_dir import written

log = logging.getLogger(__name__)
LINGER_SECONDS = 5.0
LOG_TAIL_BYTES = 4000
MODULES = frozenset({"deploy.role_process", "deploy.torchrun"})
"""What roles of a run look like in a process list."""
LEFTOVER_SECONDS = 10.0
"""Roles whose driver was killed may take this long to write their checkpoint; their peers are gone too."""


def leftovers(run_dir: Path) -> list[psutil.Process]:
    """Role processes of this run that outlived their driver, by the status files they wrote."""
    found: list[psutil.Process] = []
    for path in (run_dir / "status").glob("*.json"):
        try:
            record = json.loads(path.read_text())
            process = psutil.Process(int(record["pid"]))
            with process.oneshot():
                # A process that began after it wrote is another one with its number.
                ours = MODULES.intersection(process.cmdline())
                if ours and process.create_time() < record["time"]:
                    found.append(process)
        except (ValueError, KeyError, TypeError, psutil.Error):
            continue
    return found


def end_leftovers(run_dir: Path, timeout: float = LEFTOVER_SECONDS) -> None:
    """Wait until roles of an earlier driver have ended, kill those that do not: they hold the shards' locks.

    The caller must be the one driver of the run.
    """
    old = leftovers(run_dir)
    for process in old:
        log.warning("role of an earlier driver still runs", extra={"pid": process.pid})
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(old, timeout=timeout)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10.0)


class LocalFleet:
    """Launches `python -m deploy.role_process` children and reads their status files."""

    def __init__(self, run_dir: Path) -> None:
        """Adopt the run directory: what an earlier driver left running is ended first."""
        self._run_dir = run_dir
        end_leftovers(run_dir)
        self._children: dict[str, subprocess.Popen[bytes] | OfferedRole] = {}
        self._launched: dict[str, float] = {}

    def launch(self, spec: RoleSpec) -> None:
        """Start one role; what is left of its previous life ends first."""
        if spec.key in self._children:
            self.stop(spec.key, LINGER_SECONDS)
        (self._run_dir / "status" / f"{spec.key}.json").unlink(missing_ok=True)
        self._launched[spec.key] = time.time()
        if spec.role == "learner" and spec.config["learner"]["launch"] == "torchrun":
            self._children[spec.key] = OfferedRole(self._run_dir, spec)
        else:
            self._children[spec.key] = self._spawn(spec)

    def _spawn(self, spec: RoleSpec) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads(spec)), "PYTHONUNBUFFERED": "1"}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        path = self._run_dir / "logs" / f"{spec.key}.log"
        with written(path):
            output = path.open("ab")
        with output:
            child = subprocess.Popen(
                [sys.executable, "-m", "deploy.role_process", str(os.getpid())],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        assert child.stdin is not None
        try:
            child.stdin.write(spec.to_json().encode())
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; statuses() tells with its log
        return child

    @staticmethod
    def _threads(spec: RoleSpec) -> int:
        return int(spec.config["learner"]["threads"]) if spec.role == "learner" else 1

    def _record(self, key: str) -> dict[str, Any]:
        """The newest word of the life launched here; a dying life of an earlier driver writes there too."""
        path = self._run_dir / "status" / f"{key}.json"
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        return record if record.get("pid") == self._children[key].pid else {}

    def statuses(self) -> dict[str, RoleStatus]:
        return {key: self._status(key) for key in self._children}

    def _status(self, key: str) -> RoleStatus:
        child = self._children[key]
        if isinstance(child, OfferedRole) and not child.taken:
            self._launched[key] = time.time()  # torchrun may come as late as it likes
        code = child.poll()
        record = self._record(key)
        spoke = float(record.get("time", self._launched[key]))
        state = str(record.get("state", "starting"))
        error = str(record.get("error", ""))
        if code is not None and state not in ("stopped", "failed"):
            state = "failed"
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            error = f"ended by {how}\n{self._log_tail(key)}"
            if isinstance(child, OfferedRole):
                error = "its process is gone; the output of torchrun tells more"
        return RoleStatus(
            state=state,
            age=max(0.0, time.time() - spoke),
            pid=child.pid,
            address=str(record.get("address", "")),
            metrics_port=int(record.get("metrics_port", 0)),
            payload=record.get("payload", {}),
            error=error,
            exit_code=int(record.get("exit_code", code or 0)),
        )

    def _log_tail(self, key: str) -> str:
        path = self._run_dir / "logs" / f"{key}.log"
        raw = path.read_bytes()[-LOG_TAIL_BYTES:] if path.exists() else b""
        return "\n".join(raw.decode(errors="replace").splitlines()[-12:])

    def stop(self, key: str, timeout: float) -> RoleStatus:
        """SIGTERM, wait, then SIGKILL; returns its last status."""
        child = self._children[key]
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill(key)
        return self._status(key)

    def kill(self, key: str) -> None:
        child = self._children[key]
        if child.poll() is None:
            child.kill()
            child.wait(10)

    def close(self) -> None:
        """End every child that still runs: SIGTERM to all, then SIGKILL to what stays."""
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + 10
        for key, child in self._children.items():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill(key)
