"""The nodes of `bench.cluster` as nodes of a Ray cluster on this machine, each shard in a Ray actor.

Import it after `deploy.ray_local.prepare_ray`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from bench.cluster_nodes import ROOT, STOP_SECONDS, ShardHost
from deploy.ray_local import join_ray
from system.errors import InfrastructureError

log = logging.getLogger(__name__)

START_SECONDS = 90.0
START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 80 << 20


class RayNodes:
    """Nodes of `ray.cluster_utils.Cluster`, beside a head node that has the driver."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: dict[int, Any] = {}
        self._actors: dict[int, Any] = {}
        self._lives = 0

    def __enter__(self) -> Self:
        for left in reversed(range(START_ATTEMPTS)):
            try:
                self._open()
                return self
            except Exception as error:  # Ray raises a bare one when one of its processes starts too slowly
                self._close()
                if not left:
                    raise InfrastructureError(f"a local Ray cluster did not start ({error})") from error
                log.warning("Ray cluster did not start, trying again", extra={"cause": str(error)})
        raise AssertionError("the last attempt returns or raises")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def start(self, index: int) -> str:
        """As Nodes. Raises: InfrastructureError when its shard does not speak."""
        for left in reversed(range(START_ATTEMPTS)):
            self._bury(index)
            try:
                return self._start(index)
            except RayError as error:
                if not left:
                    raise InfrastructureError(
                        f"shard {index} did not start on a Ray node ({error})"
                    ) from error
                log.warning("Ray node did not start, trying again", extra={"cause": str(error)})
        raise AssertionError("the last attempt returns or raises")

    def kill(self, index: int) -> None:
        """As Nodes."""
        for process in self._processes(index):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def silence(self, index: int) -> None:
        """As Nodes."""
        for process in self._processes(index):
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def _start(self, index: int) -> str:
        self._lives += 1
        place = {f"node-{index}-{self._lives}": 1.0}  # Ray may still believe in the node's former life
        self._nodes[index] = self._cluster.add_node(
            wait=False, num_cpus=0, resources=place, object_store_memory=OBJECT_STORE_BYTES
        )
        host: Any = ray.remote(ShardHost)
        self._actors[index] = host.options(num_cpus=0, resources=place, max_restarts=0).remote(
            str(self._folder), index
        )
        return ray.get(self._actors[index].address.remote(), timeout=START_SECONDS)

    def _processes(self, index: int) -> list[psutil.Process]:
        """All of a node, its workers first."""
        found: list[psutil.Process] = []
        for infos in self._nodes[index].all_processes.values():
            for info in infos:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(info.process.pid)
                    found += [*process.children(recursive=True), process]
        return found

    def _bury(self, index: int) -> None:
        if index not in self._nodes:
            return
        doomed = self._processes(index)
        self.kill(index)
        psutil.wait_procs(doomed, timeout=STOP_SECONDS)
        self._cluster.remove_node(self._nodes.pop(index), allow_graceful=False)
        self._actors.pop(index, None)

    def _open(self) -> None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self._directory = tempfile.mkdtemp(prefix="dreamfleet-", dir="/tmp")
        # The cluster notes its address under this, for other drivers of the user: none of theirs may find it.
        os.environ["RAY_TMPDIR"] = self._directory
        (Path(self._directory) / "ray").mkdir()
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "temp_dir": self._directory,
            },
        )
        reaper = ROOT / "deploy" / "ray_reaper.py"
        self._reaper = subprocess.Popen(
            [sys.executable, "-P", str(reaper), str(os.getpid()), self._directory],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        join_ray(str(self._cluster.address))
        assert ray.is_initialized()

    def _close(self) -> None:
        ray.shutdown()
        if hasattr(self, "_cluster"):
            with contextlib.suppress(Exception):  # what did not start cannot be stopped
                self._cluster.shutdown()
        if hasattr(self, "_reaper"):
            self._reaper.kill()
            self._reaper.wait(START_SECONDS)
        shutil.rmtree(self._directory, ignore_errors=True)
        os.environ.pop("RAY_TMPDIR", None)
        self._nodes.clear()
        self._actors.clear()
