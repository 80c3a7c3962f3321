"""Backend `local`: each role is a plain child process; no Ray anywhere.

Also how a learner reaches a bare GPU box. Status crosses by small files in run/status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.fleet import RoleStatus
from deploy.roles import RoleSpec
from system.errors import InfrastructureError

LOG_TAIL_BYTES = 4000


class LocalFleet:
    """Launches `python -m deploy.role_process` children and reads their status files."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._launched: dict[str, float] = {}

    def launch(self, spec: RoleSpec) -> None:
        """Start one role. Raises: InfrastructureError when its previous life still runs."""
        old = self._children.get(spec.key)
        if old is not None and old.poll() is None:
            raise InfrastructureError(
                f"{spec.key} (pid {old.pid}) still runs; stop it before launching it again"
            )
        (self._run_dir / "status" / f"{spec.key}.json").unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads(spec)), "PYTHONUNBUFFERED": "1"}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        with (self._run_dir / "logs" / f"{spec.key}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "deploy.role_process"],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        assert child.stdin is not None
        try:
            child.stdin.write(spec.to_json().encode())
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; statuses() tells with its log
        self._children[spec.key] = child
        self._launched[spec.key] = time.time()

    @staticmethod
    def _threads(spec: RoleSpec) -> int:
        return int(spec.config["learner"]["threads"]) if spec.role == "learner" else 1

    def _record(self, key: str) -> dict[str, Any]:
        path = self._run_dir / "status" / f"{key}.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return {}

    def statuses(self) -> dict[str, RoleStatus]:
        return {key: self._status(key) for key in self._children}

    def _status(self, key: str) -> RoleStatus:
        code = self._children[key].poll()
        record = self._record(key)
        spoke = float(record.get("time", self._launched[key]))
        state = str(record.get("state", "starting"))
        error = str(record.get("error", ""))
        if code is not None and state not in ("stopped", "failed"):
            state = "failed"
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            error = f"ended by {how}\n{self._log_tail(key)}"
        return RoleStatus(
            state=state,
            age=max(0.0, time.time() - spoke),
            pid=self._children[key].pid,
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
