"""How fast rows go into a replay shard over the wire: client processes, acknowledged appends.

Beside it, before and after, how fast the same disk takes a new file from end to end: on a virtual
machine whose memory the host takes back when it lies idle, pages that are touched anew bound both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from bench.load import Row, Samples, repeat
from bench.replay_feed import STREAMS, TIMEOUT, Feed
from replay import synthetic
from replay.client import GrpcReplayWriter
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import InfrastructureError
from system.experience import StreamId
from system.heap import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
CAPACITY_ROWS = {"image": 100_000, "vector": 1_000_000}
TABLES = {"image": synthetic.image_table, "vector": lambda: synthetic.vector_table(24)}


WRITE_NBYTES = 512 << 20
BLOCK = bytes(4 << 20)


def insert_rows(root: Path, case: str, clients: int, seconds: float) -> Iterator[Row]:
    """disk_write and insert_rate, whose ratio compares the bytes of the rows with it."""
    writes = [write_rate(root), write_rate(root)]
    inserted = insert_samples(root, case, clients, seconds)
    writes += [write_rate(root), write_rate(root)]
    name = f"{case} x{clients}"
    disk = Samples(values=tuple(writes), foreign_load=inserted.foreign_load, cpu_per_wall=1.0)
    yield disk.row("replay", name, "disk_write", "GB/s", value=disk.median / 1e9)
    ratio = inserted.median * TABLES[case]().row_nbytes / disk.median
    yield inserted.row("replay", name, "insert_rate", "rows/s", ratio=ratio, ratio_to="disk_write")


def write_rate(root: Path) -> float:
    """Bytes per second of writing a new file and its way to the disk."""
    path = root / "sequential"
    with path.open("wb", buffering=0) as file:
        begun = time.perf_counter()
        for _ in range(WRITE_NBYTES // len(BLOCK)):
            file.write(BLOCK)
        os.fdatasync(file.fileno())
        spent = time.perf_counter() - begun
    path.unlink()
    return WRITE_NBYTES / spent


def insert_samples(root: Path, case: str, clients: int, seconds: float) -> Samples:
    """Rows per second acknowledged to all clients together, in rounds."""
    with ExitStack() as stack:
        server = stack.enter_context(_child(f"serve({str(root)!r}, {case!r})"))
        port = int(_answer(server))
        senders = [
            stack.enter_context(_child(f"send({port}, {case!r}, {index}, {seconds / ROUNDS})"))
            for index in range(clients)
        ]
        for sender in senders:
            _answer(sender)

        def round_rate() -> float:
            for sender in senders:
                _tell(sender, "go")
            return sum(float(_answer(sender)) for sender in senders)

        stored = 0.0
        while stored < CAPACITY_ROWS[case]:  # sustained means: at capacity, evicting as fast as it inserts
            stored += round_rate() * seconds / ROUNDS
        return repeat(round_rate, seconds=0.0, least=ROUNDS)


def serve(root: str, case: str) -> None:
    """Child process: a shard without limits until stdin closes; set up as `deploy.roles.ShardRole` does."""
    keep_freed_memory(one_heap=True)
    shard = ReplayShard(Path(root), 0, TABLES[case](), capacity_rows=CAPACITY_ROWS[case])
    server = serve_shard(shard, "127.0.0.1:0")
    print(server.port, flush=True)
    sys.stdin.read()
    server.stop()
    shard.close()


def send(port: int, case: str, index: int, seconds: float) -> None:
    """Child process: for each line on stdin, append for `seconds` and print the rows per second."""
    table = TABLES[case]()
    feeds = [Feed(table, StreamId(actor=index, env=env)) for env in range(STREAMS)]
    with closing(GrpcReplayWriter(f"127.0.0.1:{port}", table)) as writer:
        print("ready", flush=True)
        for _ in sys.stdin:
            begun, stored = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds:
                stored += writer.append([feed.next() for feed in feeds], TIMEOUT).committed
            print(stored / (time.perf_counter() - begun), flush=True)


@contextmanager
def _child(call: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"from bench.replay_inserts import serve, send; {call}"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.communicate("", timeout=TIMEOUT)


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise InfrastructureError("a bench process ended early; see its message above")
    return line.strip()
