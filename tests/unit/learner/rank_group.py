"""Groups of rank processes for tests: start, listen to what they say, break them, always end them."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("rank_process.py")
ROOT = str(Path(__file__).resolve().parents[3])
PATIENCE = 120.0
"""Imports of torch by several processes at once; only a hang lasts longer."""


class RankGroup:
    """Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        ranks: int,
        *,
        updates: int,
        silence: float = 3.0,
        out: str = "",
        seed: int = 0,
        late: bool = False,
        tasks: dict[int, dict[str, Any]] | None = None,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        place = {
            "ranks": ranks, "host": "127.0.0.1", "port": port, "secret": "between us", "silence": silence,
        }  # fmt: skip
        task = {
            "updates": updates, "out": out, "seed": seed, "late": late, "stuck_after": None,
            "fail_after": None, "mark": str(folder / "ended"),
        }  # fmt: skip
        self._errors = [folder / f"rank-{rank}.err" for rank in range(ranks)]
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(ranks):
            given = json.dumps({**task, "place": {**place, "rank": rank}, **(tasks or {}).get(rank, {})})
            with self._errors[rank].open("wb") as errors:
                process = subprocess.Popen(
                    [sys.executable, str(PROGRAM), given], stdout=subprocess.PIPE, stderr=errors, text=True,
                    env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            self.processes.append(process)
        self._said: list[queue.Queue[list[Any]]] = [queue.Queue() for _ in range(ranks)]
        self._readers = [
            threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in range(ranks)
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
        for process, reader in zip(self.processes, self._readers, strict=True):
            reader.join(10)
            assert process.stdout is not None
            process.stdout.close()

    def _read(self, rank: int) -> None:
        stream = self.processes[rank].stdout
        assert stream is not None
        for line in stream:
            self._said[rank].put(json.loads(line))
        self._said[rank].put(["ended"])

    def until(self, rank: int, *words: object, seconds: float = PATIENCE) -> list[Any]:
        """What the rank says, beginning with `words`; whatever it says before is dropped."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                said = self._said[rank].get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"rank {rank} did not say {words} in {seconds} s") from None
            if said[: len(words)] == list(words):
                return said[len(words) :]
            assert said[0] in ("joined", "update"), (said, self._errors[rank].read_text()[-2000:])

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)
