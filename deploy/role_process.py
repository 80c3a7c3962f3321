"""One role in one operating-system process: `python -m deploy.role_process PARENT`, spec on standard input.

Reports once a second by replacing run/status/<role>-<index>.json; SIGTERM asks it to finish its
slice and stop; it ends by itself when PARENT, the driver that launched it, is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.log_lines import log_to_stderr
from deploy.roles import Role, RoleSpec, make_role
from deploy.run_dir import write_atomic
from system.errors import DreamfleetError, PreflightError

log = logging.getLogger(__name__)
SLICE_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


class Reporter:
    """Holds this role's newest record and hands each one to `keep`."""

    def __init__(self, spec: RoleSpec, keep: Callable[[dict[str, Any]], None]) -> None:
        self._keep = keep
        self._base: dict[str, Any] = {
            "role": spec.role, "index": spec.index, "incarnation": spec.incarnation, "pid": os.getpid(),
        }  # fmt: skip
        self.payload: dict[str, Any] = {}

    def update(self, **fields: Any) -> None:
        self._base |= fields

    def write(self, state: str, **fields: Any) -> None:
        self._keep({**self._base, "state": state, "time": time.time(), "payload": self.payload, **fields})


def die_with_parent(parent: int) -> None:
    """Ask Linux to send SIGTERM when the parent dies, and watch for it elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)  # a role stuck in C code must not outlive its run
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def run(spec: RoleSpec, stop: threading.Event, reporter: Reporter) -> int:
    """Start, work in slices until `stop`, stop. Returns the exit code; raises nothing."""
    try:
        reporter.write("starting")
        role: Role = make_role(spec)
        metrics_port = role.metrics.serve() if hasattr(role, "metrics") else 0  # type: ignore[attr-defined]
        started = role.start()
        reporter.update(address=started.pop("address", ""), metrics_port=metrics_port)
        reporter.payload = started
        reporter.write("running")
        while not stop.is_set():
            reporter.payload = role.work(SLICE_SECONDS)
            reporter.write("running")
        reporter.payload |= role.stop()
        reporter.write("stopped")
    except Exception as error:
        if isinstance(error, DreamfleetError):  # says itself what to do; its log may be shown to a person
            code, text = error.exit_code, str(error)
            log.error("role failed", extra={"kind": type(error).__name__, "why": text})
        else:
            code, text = 1, traceback.format_exc(limit=-6)
            log.exception("role failed")
        with contextlib.suppress(PreflightError):  # a full disk: the exit code and the log tell as well
            reporter.write("failed", error=text, kind=type(error).__name__, exit_code=code)
        return code
    return 0


def main() -> None:
    parent = int(sys.argv[1])  # os.getppid() would be wrong here already if the driver died meanwhile
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s %(message)s")
    spec = RoleSpec.from_json(sys.stdin.read())
    die_with_parent(parent)
    path = Path(spec.run_dir) / "status" / f"{spec.key}.json"
    reporter = Reporter(spec, lambda record: write_atomic(path, json.dumps(record, default=float)))
    code = run(spec, stop, reporter)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # native pools (envpool, gRPC) need no teardown and may hang in it


if __name__ == "__main__":
    main()
