"""How fast rows go into a replay shard over the wire: client processes, acknowledged appends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from bench.load import Row, repeat
from bench.replay_feed import STREAMS, TIMEOUT, Feed
from replay import synthetic
from replay.client import GrpcReplayWriter
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import InfrastructureError
from system.experience import StreamId

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
CAPACITY_ROWS = {"image": 100_000, "vector": 1_000_000}
TABLES = {"image": synthetic.image_table, "vector": lambda: synthetic.vector_table(24)}


def insert_row(root: Path, case: str, clients: int, seconds: float) -> Row:
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

        round_rate()  # the first segments are made, connections opened
        return repeat(round_rate, seconds=0.0, least=ROUNDS).row(
            "replay", f"{case} x{clients}", "insert_rate", "rows/s"
        )


def serve(root: str, case: str) -> None:
    """Child process: a shard without limits until stdin closes."""
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
