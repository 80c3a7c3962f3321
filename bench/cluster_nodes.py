"""Nodes with one replay shard each, to be killed and brought back: processes; Ray nodes are in `cluster_ray`.

A node's shard has a directory of its own, which outlives the node as its disk would.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from replay import synthetic
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import InfrastructureError

ROOT = Path(__file__).resolve().parent.parent
TABLE = synthetic.vector_table()
CAPACITY_ROWS = 1 << 16
STOP_SECONDS = 10.0


class Nodes(Protocol):
    """Some nodes, by number; the address of a shard changes with every start."""

    def start(self, index: int) -> str:
        """Bring a node up and return its shard's address."""
        ...

    def kill(self, index: int) -> None:
        """End a node as a power cut would: none of its processes gets to do anything any more."""
        ...

    def silence(self, index: int) -> None:
        """Cut a node off: it answers nothing and refuses nothing. Only `kill` and `start` follow."""
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
            self._bury(index)

    def start(self, index: int) -> str:
        """As Nodes. Raises: InfrastructureError when the process ends early."""
        self._bury(index)
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
        self._running[index].kill()

    def silence(self, index: int) -> None:
        """As Nodes."""
        self._running[index].send_signal(signal.SIGSTOP)

    def _bury(self, index: int) -> None:
        process = self._running.pop(index, None)
        if process is not None:
            process.kill()
            process.communicate(timeout=STOP_SECONDS)
