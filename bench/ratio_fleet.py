"""Child processes of replay benches: shards behind gRPC, and writers that stand for actors.

Each child ends when its standard input closes, so nothing outlives the bench, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from bench.replay_feed import Feed
from learner.batches import Batches
from replay import synthetic
from replay.client import GrpcReplayWriter, GrpcShardControl
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import DeadlineError, InfrastructureError
from system.experience import StreamId
from system.seeds import generator
from system.specs import TableSpec

ROOT = Path(__file__).resolve().parent.parent
TABLES: dict[str, Callable[[], TableSpec]] = {
    "image": synthetic.image_table,
    "vector": lambda: synthetic.vector_table(24),
}
APPEND_SECONDS = 5.0
MOOD_SECONDS = 5.0
"""How often a writer changes its speed."""
START_SECONDS = 60.0
CLOSE_SECONDS = 15.0
CONTEXT, DEPTH = 1, 2
"""Rows that only supply latents, and batches drawn ahead: as a run has them."""


class Child:
    """One child process that runs `call` of this module and may print one line when it is ready."""

    def __init__(self, call: str, *, ready: bool, before: Callable[[], None] | None = None) -> None:
        """`before` runs in the child ahead of Python. Raises: InfrastructureError when it ends unready."""
        code = f"from bench.ratio_fleet import read, serve, write; {call}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before,
        )  # fmt: skip
        self.pid = self._process.pid
        self.said = self._answer() if ready else ""
        self.stopped = False
        self._listener: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)
        self.stopped = False

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._release()

    def listen(self) -> None:
        """Keep the newest line it prints in `said`, in a thread."""
        stdout = self._process.stdout
        assert stdout is not None

        def follow() -> None:
            with contextlib.suppress(ValueError):  # closed while reading
                for line in stdout:
                    self.said = line

        self._listener = threading.Thread(target=follow, daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Let it end by itself, or end it."""
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._release()

    def _release(self) -> None:
        """Wait for its end and close the pipes."""
        self._process.wait(CLOSE_SECONDS)
        if self._listener is not None:
            self._listener.join(CLOSE_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise InfrastructureError("a bench process ended before it was ready; see its message above")
        return line.strip()


def shard_child(
    root: Path, index: int, case: str, capacity: int, *, port: int = 0, grant: int,
    segment: int | None = None, before: Callable[[], None] | None = None,
) -> tuple[Child, int]:  # fmt: skip
    """A served shard and its port."""
    call = f"serve({str(root)!r}, {index}, {case!r}, {capacity}, {port}, {grant}, {segment})"
    child = Child(call, ready=True, before=before)
    return child, int(child.said)


def writer_child(
    port: int, case: str, actor: int, incarnation: int, *, rate: float, envs: int, chunk: int, seed: int,
    before: Callable[[], None] | None = None,
) -> Child:  # fmt: skip
    """A writer of about `rate` rows per second."""
    call = f"write({port}, {case!r}, {actor}, {incarnation}, {rate}, {envs}, {chunk}, {seed})"
    return Child(call, ready=False, before=before)


def reader_child(
    root: Path, ports: list[int], case: str, *, batch: int, length: int, ratio: float, prefill: int,
    update_seconds: float, seed: int, before: Callable[[], None] | None = None,
) -> Child:  # fmt: skip
    """A learner without a model, that says after every batch what it has done (`Child.listen`)."""
    call = f"read({str(root)!r}, {ports}, {case!r}, {batch}, {length}, {ratio}, {prefill}, "
    call += f"{update_seconds}, {seed})"
    return Child(call, ready=False, before=before)


# ---- in the children ----------------------------------------------------------------------------------


def serve(
    root: str, index: int, case: str, capacity: int, port: int, grant: int, segment: int | None
) -> None:
    """Child: one shard until stdin closes; a restarted one waits for the port of its former life."""
    shard = ReplayShard(
        Path(root), index, TABLES[case](),
        capacity_rows=capacity, segment_rows=segment, initial_grant=grant,
    )  # fmt: skip
    server = serve_shard(shard, f"127.0.0.1:{port}")
    print(server.port, flush=True)
    sys.stdin.read()
    server.stop()
    shard.close()


def write(
    port: int, case: str, actor: int, incarnation: int, rate: float, envs: int, chunk: int, seed: int
) -> None:
    """Child: make rows as an actor does, at a speed that changes now and then, until stdin closes."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    table, rng = TABLES[case](), generator(seed, "writer", actor, incarnation)
    feeds = [
        Feed(table, StreamId(actor=actor, env=env), incarnation=incarnation, chunk=chunk)
        for env in range(envs)
    ]
    mood, mood_until = rate, 0.0
    with closing(GrpcReplayWriter(f"127.0.0.1:{port}", table)) as writer:
        while True:
            if time.monotonic() >= mood_until:
                mood = rate * float(np.exp(rng.normal(0.0, 0.5)))
                mood_until = time.monotonic() + MOOD_SECONDS
            time.sleep(envs * chunk / mood)
            chunks = [feed.next() for feed in feeds]
            while True:
                try:
                    writer.append(chunks, APPEND_SECONDS)
                    break
                except (DeadlineError, InfrastructureError):
                    continue  # back-pressure or a dead shard: the same rows go again


def read(
    root: str, ports: list[int], case: str, batch: int, length: int, ratio: float, prefill: int,
    update_seconds: float, seed: int,
) -> None:  # fmt: skip
    """Child: take batches, wait as long as an update would take, report each, until stdin closes."""
    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), closed.set()), daemon=True).start()
    limiter = RateLimiter(ratio, prefill, 4 * batch * length, length + CONTEXT, paced=True)
    controls = [GrpcShardControl(f"127.0.0.1:{port}") for port in ports]
    reader = LocalReader(
        Path(root), TABLES[case](), batch=batch, length=length, context=CONTEXT, seed=seed,
        limiter=limiter, controls=controls, ring=DEPTH + 2,
    )  # fmt: skip
    batches = Batches(reader, DEPTH, 0.5, ring=DEPTH + 2)
    taken = check = 0
    while not closed.is_set():
        with contextlib.suppress(DeadlineError):
            sequence = batches.next()
            check ^= int(sequence.columns["policy_version"].sum())  # touch what was copied
            taken += 1
        line = {"trained": taken * batch * length, "line": reader.governor.line()}
        print(json.dumps(line), flush=True)
        time.sleep(update_seconds)
    batches.stop()
    reader.close()
    for control in controls:
        control.close()
