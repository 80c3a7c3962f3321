"""How fast a policy version streams from the parameter server, beside the same bytes over a plain socket.

The server runs in a process of its own, as it does in a run. A fetch counts as done when the arrays
are rebuilt, their digest verified and every float found finite.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.load import Row, repeat, timed
from system.errors import InfrastructureError
from system.params.client import GrpcWeightSink, GrpcWeightSource
from system.params.server import ParameterServer
from system.seeds import generator
from system.weights import NO_VERSION, PolicyVersion, Weights
from system.wire import FRAME_BYTES

MIB = 1 << 20
TIMEOUT = 120.0
ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, nargs="+", default=[2, 48, 400], help="sizes of a version")
    parser.add_argument("--seconds", type=float, default=5.0, help="measure each figure for about so long")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """stream_rate (fetch) and publish_rate of each size, and the loopback rate they are compared with."""
    for mib in options.mib:
        yield from _rows_of_size(mib * MIB, f"{mib}MiB", options.seconds)


def _rows_of_size(nbytes: int, case: str, seconds: float) -> Iterator[Row]:
    weights = made_up(nbytes, PolicyVersion(1, 1))
    buffer = np.empty(nbytes, np.uint8)
    with _server(nbytes) as ports:
        address = f"127.0.0.1:{ports['grpc']}"
        loopback = repeat(
            lambda: _rate(nbytes, timed(lambda: _receive(ports["raw"], buffer))), seconds=seconds
        )
        source = GrpcWeightSource(address)
        fetched = repeat(
            lambda: _rate(nbytes, timed(lambda: source.latest(NO_VERSION, TIMEOUT))), seconds=seconds
        )
        source.close()
        published = repeat(_Publishing(address, weights), seconds=seconds / 2)
    yield loopback.row("weights", case, "loopback_rate", "GB/s")
    for name, samples in (("stream_rate", fetched), ("publish_rate", published)):
        share = samples.median / loopback.median
        yield samples.row("weights", case, name, "GB/s", ratio=share, ratio_to="loopback_socket")


def made_up(nbytes: int, version: PolicyVersion) -> Weights:
    """float32 weights in a few large and many small arrays, as models have them."""
    rng = generator(0, "bench", "weights")
    arrays: dict[str, Any] = {f"bias.{i}": rng.normal(size=64).astype(np.float32) for i in range(50)}
    left = nbytes // 4 - 50 * 64
    for i in range(8):
        arrays[f"kernel.{i}"] = rng.standard_normal(left // 8, dtype=np.float32)
    return Weights.of(version, arrays)


def serve(nbytes: int) -> None:
    """Child process: hold one version and one raw buffer until stdin closes."""
    server = ParameterServer("127.0.0.1:0")
    server.publish(made_up(nbytes, PolicyVersion(1, 1)))
    listener = socket.create_server(("127.0.0.1", 0))
    payload = memoryview(bytes(nbytes))
    threading.Thread(target=_send_raw, args=(listener, payload), daemon=True).start()
    print(json.dumps({"grpc": server.port, "raw": listener.getsockname()[1]}), flush=True)
    sys.stdin.read()
    server.stop()


def _send_raw(listener: socket.socket, payload: memoryview) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            for at in range(0, len(payload), FRAME_BYTES):
                connection.sendall(payload[at : at + FRAME_BYTES])


def _receive(port: int, buffer: np.ndarray[Any, Any]) -> None:
    view, at = buffer.data, 0
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        while at < len(view):
            got = connection.recv_into(view[at : at + FRAME_BYTES])
            if got == 0:
                raise InfrastructureError(
                    f"loopback sender ended after {at} of {len(view)} bytes; run it again"
                )
            at += got


class _Publishing:
    """One publish per call, each with the next version; returns its GB/s."""

    def __init__(self, address: str, weights: Weights) -> None:
        self._sink = GrpcWeightSink(address, timeout=TIMEOUT)
        self._weights = weights
        self._counter = weights.version.counter

    def __call__(self) -> float:
        self._counter += 1
        version = PolicyVersion(1, self._counter)
        weights = Weights(version=version, arrays=self._weights.arrays, digest=self._weights.digest)
        return _rate(weights.nbytes, timed(lambda: self._sink.publish(weights)))


def _rate(nbytes: int, seconds: float) -> float:
    return nbytes / seconds / 1e9


@contextmanager
def _server(nbytes: int) -> Iterator[dict[str, int]]:
    command = [sys.executable, "-c", f"from bench.weights import serve; serve({nbytes})"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise InfrastructureError("the parameter server process ended at once; see its message above")
        yield json.loads(line)
    finally:
        process.communicate("", timeout=60.0)
