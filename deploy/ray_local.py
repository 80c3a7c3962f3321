"""Starting and ending a small local Ray for one run, or joining a cluster.

Importing this module does not import Ray: `prepare_ray` has to come first. Neighbours: `deploy.ray_fleet`,
`deploy.ray_reaper`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import psutil

from system.errors import InfrastructureError

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100 << 20
"""No experience crosses Ray's object store; this is near its least size."""
START_ATTEMPTS = 3
SLOWEST_START = 90
"""Seconds that Ray's first server may take to come up; 30 by itself, which a busy machine can exceed."""
LONGEST_TEMPORARY = 24
"""Ray puts sockets 80 characters deeper, and a socket's path must stay below 107."""


def prepare_ray() -> None:
    """Settings that Ray reads once, when it is imported; does nothing afterwards.

    A local Ray then refuses whoever lacks a fresh random token: its servers listen on every interface and run
    what they are told. A cluster's or user's own choice is left alone. And Ray no longer prints a paragraph
    on our standard output for each lost role, which the driver reports in its own way.
    """
    if "ray" in sys.modules:
        return
    if not {"RAY_AUTH_MODE", "RAY_ADDRESS"} & os.environ.keys():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(SLOWEST_START))


def join_ray(address: str, **arguments: Any) -> None:
    """ray.init that keeps our SIGTERM handler, which asks for a last checkpoint; Ray would replace it.

    Raises: InfrastructureError when Ray does not start or answer.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except Exception as error:  # Ray raises a bare Exception when one of its processes starts too slowly
        raise InfrastructureError(
            f"Ray at {address!r} did not start or answer ({error}); check RAY_ADDRESS and the memory of this "
            "machine, or use --backend local"
        ) from error
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGTERM, before)


def _end_failed_start(error: BaseException, directory: str) -> None:
    """End what a failed start of Ray left running.

    Ray's node object starts the processes within its constructor, so one that failed is known to nobody but
    the frames of its error; it alone can wait for its children, without which each is warned about when it
    is collected. What it does not know itself goes by the directory our children were told.
    """
    from ray._private.node import Node

    cause = error.__cause__
    for frame, _ in traceback.walk_tb(cause.__traceback__ if cause is not None else None):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            break
    left: list[psutil.Process] = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(directory in word for word in child.cmdline()):
                child.kill()
                left.append(child)
    psutil.wait_procs(left, timeout=5.0)


class LocalRay:
    """A small Ray on this machine for one run; ends with this process, however that ends."""

    def __init__(self, cpus: int = 1) -> None:
        """`cpus`: what tasks and trials may book, and workers started ahead; our roles book none."""
        if os.environ.get("RAY_AUTH_MODE") != "token":
            log.warning("local Ray has no token, so any peer on the network may use it; RAY_AUTH_MODE=token")
        for left in reversed(range(START_ATTEMPTS)):
            try:
                self._start(cpus)
                break
            except InfrastructureError as error:
                if not left:
                    raise
                # Ray gives its own processes some seconds to start; a busy machine may need more.
                log.warning("local Ray did not start, trying again", extra={"cause": str(error)})
        reaper = Path(__file__).with_name("ray_reaper.py")
        self._reaper = subprocess.Popen(
            [sys.executable, "-P", str(reaper), str(os.getpid()), self._directory],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _start(self, cpus: int) -> None:
        """One attempt, in a directory of its own. Raises: InfrastructureError, with nothing left behind."""
        import ray

        base = tempfile.gettempdir()
        self._directory = tempfile.mkdtemp(
            prefix="dreamfleet-", dir=base if len(base) <= LONGEST_TEMPORARY else "/tmp"
        )
        try:
            join_ray(
                "local",
                num_cpus=cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _temp_dir=self._directory,
                _node_ip_address="127.0.0.1",
            )
        except InfrastructureError as error:
            ray.shutdown()
            _end_failed_start(error, self._directory)
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._reaper.kill()
        self._reaper.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
