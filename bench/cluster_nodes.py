"""Nodes with one replay shard each, to be killed and brought back: processes, or nodes of a Ray cluster.

A node's shard has a directory of its own, which outlives the node as its disk would.
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
from typing import Any, Protocol, Self

import psutil

from replay import synthetic
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import InfrastructureError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
TABLE = synthetic.vector_table()
CAPACITY_ROWS = 1 << 16
START_SECONDS = 90.0
START_ATTEMPTS = 3
STOP_SECONDS = 10.0
OBJECT_STORE_BYTES = 80 << 20


class Nodes(Protocol):
    """Some nodes, by number; the address of a shard changes with every start."""

    def start(self, index: int) -> str:
        """Bring a node up and return its shard's address."""
        ...

    def kill(self, index: int) -> None:
        """End a node as a power cut would: none of its processes gets to do anything any more."""
        ...


class ShardHost:
    """One served shard."""

    def __init__(self, folder: str, index: int) -> None:
        self._shard = ReplayShard(Path(folder) / f"node-{index}", index, TABLE, capacity_rows=CAPACITY_ROWS)
        self._server = serve_shard(self._shard, "127.0.0.1:0")

    def address(self) -> str:
        return self._server.address


def host(folder: str, index: int) -> None:
    """A process that serves one shard until its standard input closes."""
    served = ShardHost(folder, index)
    print(served.address(), flush=True)
    sys.stdin.read()
    os._exit(0)


class ProcessNodes:
    """Nodes that are a process each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in list(self._running):
            self.kill(index)

    def start(self, index: int) -> str:
        """As Nodes. Raises: InfrastructureError when the process ends early."""
        code = f"from bench.cluster_nodes import host; host({str(self._folder)!r}, {index})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._running[index] = process
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise InfrastructureError(f"the process of shard {index} ended early; see its message above")
        return address

    def kill(self, index: int) -> None:
        """As Nodes."""
        process = self._running.pop(index)
        process.kill()
        process.communicate(timeout=STOP_SECONDS)


class RayNodes:
    """Nodes of `ray.cluster_utils.Cluster`, beside a head node that has the driver."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: dict[int, Any] = {}
        self._actors: dict[int, Any] = {}

    def __enter__(self) -> Self:
        from deploy.ray_local import prepare_ray

        prepare_ray()
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
        import ray
        from ray.exceptions import RayError

        node = self._cluster.add_node(
            wait=False,
            num_cpus=0,
            resources={f"node-{index}": 1.0},
            object_store_memory=OBJECT_STORE_BYTES,
        )
        self._nodes[index] = node
        host = ray.remote(ShardHost).options(  # type: ignore[reportArgumentType]
            num_cpus=0, resources={f"node-{index}": 1.0}, max_restarts=0
        )
        self._actors[index] = host.remote(str(self._folder), index)
        try:
            return ray.get(self._actors[index].address.remote(), timeout=START_SECONDS)
        except RayError as error:
            raise InfrastructureError(f"shard {index} did not start on its Ray node ({error})") from error

    def kill(self, index: int) -> None:
        """As Nodes."""
        node = self._nodes.pop(index)
        del self._actors[index]
        below: list[psutil.Process] = []
        for infos in node.all_processes.values():
            for info in infos:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(info.process.pid)
                    below += [*process.children(recursive=True), process]
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(below, timeout=STOP_SECONDS)
        self._cluster.remove_node(node, allow_graceful=False)

    def _open(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        from deploy.ray_local import join_ray

        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self._directory = tempfile.mkdtemp(prefix="dreamfleet-", dir="/tmp")
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
        import ray

        ray.shutdown()
        if hasattr(self, "_cluster"):
            with contextlib.suppress(Exception):  # what did not start cannot be stopped
                self._cluster.shutdown()
        if hasattr(self, "_reaper"):
            self._reaper.kill()
            self._reaper.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._nodes.clear()
        self._actors.clear()
