"""How fast batches come out of the replay beside plain memcpy, and how fast rows go in over gRPC.

Batches are 16 x 65 rows of 64x64x3 images, vectors and everything else a row has. `memcpy` is one copy of as
many bytes out of as much memory into the same kind of page-aligned ring, interleaved with the sampling.
Inserts come from client processes through the real wire into a shard process, acknowledged.
"""

from __future__ import annotations

import argparse
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.load import Load, Row, Samples, repeat, timed
from replay import synthetic
from replay.client import GrpcReplayWriter
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.service import serve_shard
from replay.shard import ReplayShard
from system.errors import InfrastructureError
from system.experience import Chunk, StreamId
from system.specs import ROW_COLUMNS, TableSpec

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH, CONTEXT, RING = 16, 64, 1, 3
STREAMS = 8
CHUNK_ROWS = 64
ROUNDS = 5
CAPACITY_ROWS = {"image": 100_000, "vector": 1_000_000}
TIMEOUT = 120.0
TABLES: dict[str, Callable[[], TableSpec]] = {
    "image": synthetic.image_table,
    "vector": lambda: synthetic.vector_table(24),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the sampled replay")
    parser.add_argument("--seconds", type=float, default=10.0, help="measure each figure for about so long")
    parser.add_argument("--clients", type=int, default=2, help="processes that insert at once")
    parser.add_argument(
        "--root", type=Path, default=None, help="directory for the replay; default: temporary"
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """sample_rate (ratio to memcpy), append_rate in process, insert_rate over the wire."""
    with tempfile.TemporaryDirectory(prefix="bench-replay-", dir=options.root) as name:
        yield from _sample_rows(Path(name), options.gigabytes, options.seconds)
    for case in TABLES:
        with tempfile.TemporaryDirectory(prefix="bench-replay-", dir=options.root) as name:
            yield _insert_row(Path(name), case, options.clients, options.seconds)


# ---- sampling -----------------------------------------------------------------------------------------


def _sample_rows(root: Path, gigabytes: float, seconds: float) -> Iterator[Row]:
    table = synthetic.image_table()
    wanted = int(gigabytes * 1e9 / table.row_nbytes)
    with closing(ReplayShard(root, 0, table, capacity_rows=2 * wanted)) as shard:
        with Load() as load:
            spent = _fill(shard, table, wanted)
        filled = Samples(values=(wanted / spent,), foreign_load=load.foreign, cpu_per_wall=load.cpu_per_wall)
        case = f"image {gigabytes:g}GB"
        yield filled.row("replay", case, "append_rate", "rows/s")
        limiter = RateLimiter(1e9, 1, 1 << 40, 1)
        reader = LocalReader(
            root,
            table,
            batch=BATCH,
            length=LENGTH,
            context=CONTEXT,
            seed=0,
            limiter=limiter,
            controls=[shard],
            ring=RING,
        )
        with closing(reader):
            nbytes = sum(array.nbytes for array in reader.sample(TIMEOUT).columns.values())
            copy = _Memcpy(nbytes, int(gigabytes * 1e9 / nbytes))
            yield from _compare(case, nbytes, lambda: reader.sample(TIMEOUT), copy, seconds)


def _compare(
    case: str, nbytes: int, sample: Callable[[], object], copy: Callable[[], None], seconds: float
) -> Iterator[Row]:
    """Time both in turn, so that other load hits both alike."""
    copies: list[float] = []

    def both() -> float:
        copies.append(timed(copy))
        return timed(sample)

    repeat(both, seconds=seconds / 5)  # faults the maps in
    copies.clear()
    sampled = repeat(both, seconds=seconds)
    copied = Samples(
        values=tuple(copies), foreign_load=sampled.foreign_load, cpu_per_wall=sampled.cpu_per_wall
    )
    ratio = copied.median / sampled.median
    for name, samples in (("memcpy_rate", copied), ("sample_rate", sampled)):
        more: dict[str, Any] = {"ratio": ratio, "ratio_to": "memcpy"} if name == "sample_rate" else {}
        yield samples.row("replay", case, name, "GB/s", value=nbytes / samples.median / 1e9, **more)
    yield sampled.row("replay", case, "sample_ms", "ms", value=1e3 * sampled.median)
    yield sampled.row("replay", case, "sequence_rate", "seq/s", value=BATCH / sampled.median)


class _Memcpy:
    """One copy of `nbytes` per call, out of `blocks` places in turn, into a ring like the sampler's."""

    def __init__(self, nbytes: int, blocks: int) -> None:
        self._source = _pages(nbytes * blocks).reshape(blocks, nbytes)
        self._source[:] = 1
        self._ring = [_pages(nbytes) for _ in range(RING)]
        self._turn = 0

    def __call__(self) -> None:
        self._turn += 1
        # A large odd stride: the next block is not the one the hardware prefetched.
        block = self._turn * 7919 % len(self._source)
        self._ring[self._turn % RING][:] = self._source[block]


def _pages(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def _fill(shard: ReplayShard, table: TableSpec, count: int) -> float:
    """Append about `count` rows to STREAMS streams; return the seconds spent in append."""
    feeds = [_Feed(table, StreamId(actor=0, env=env)) for env in range(STREAMS)]
    spent = 0.0
    for _ in range(-(-count // (STREAMS * CHUNK_ROWS))):
        chunks = [feed.next() for feed in feeds]
        spent += timed(lambda chunks=chunks: shard.append(chunks, TIMEOUT))
    return spent


class _Feed:
    """Endless chunks of one stream: the noise repeats every few chunks, the identity goes on."""

    def __init__(self, table: TableSpec, stream: StreamId) -> None:
        self._noise = [synthetic.rows(table, stream, n * CHUNK_ROWS, CHUNK_ROWS).columns for n in range(4)]
        self._table = TableSpec(
            columns={k: v for k, v in table.columns.items() if k in ROW_COLUMNS}, overlay={}
        )
        self._stream = stream
        self._sent = 0

    def next(self) -> Chunk:
        identity = synthetic.rows(self._table, self._stream, self._sent, CHUNK_ROWS).columns
        noise = self._noise[self._sent // CHUNK_ROWS % len(self._noise)]
        self._sent += CHUNK_ROWS
        return Chunk(stream=self._stream, columns={**noise, **identity})


# ---- inserting ----------------------------------------------------------------------------------------


def _insert_row(root: Path, case: str, clients: int, seconds: float) -> Row:
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
    feeds = [_Feed(table, StreamId(actor=index, env=env)) for env in range(STREAMS)]
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
        [sys.executable, "-c", f"from bench.replay import serve, send; {call}"],
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
