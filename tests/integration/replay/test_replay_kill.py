"""SIGKILL at random moments: every acknowledged row is there afterwards, once, byte for byte."""

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from bench import damage
from replay import layout, seal, synthetic
from replay.client import GrpcReplayWriter
from replay.quarantine import quarantined
from replay.shard import ReplayShard
from replay.view import TableView
from system.experience import StreamId
from system.specs import TableSpec

TABLE = synthetic.vector_table()

WRITER = """
import random, sys
from pathlib import Path
from replay import synthetic
from replay.shard import ReplayShard
from replay.view import TableView
from system.experience import StreamId

root, capacity, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
table = synthetic.vector_table()
shard = ReplayShard(root, 0, table, capacity_rows=capacity)
rng = random.Random(seed)
sent = {}
for key, runs in TableView(root, table, 1).index.streams.items():
    sent[key[1]] = runs.hi
print("open", shard.stats().inserted, flush=True)
while True:
    env = rng.randrange(3)
    start, count = sent.get(env, 0), rng.randrange(1, 90)
    shard.append([synthetic.rows(table, StreamId(actor=0, env=env), start, count)], 10.0)
    sent[env] = start + count
    print(env, sent[env], flush=True)
"""

SERVER = """
import sys, time
from pathlib import Path
from replay import synthetic
from replay.service import serve_shard
from replay.shard import ReplayShard

shard = ReplayShard(Path(sys.argv[1]), 0, synthetic.vector_table(), capacity_rows=65536)
server = serve_shard(shard, sys.argv[2])
print(server.address, flush=True)
time.sleep(600)
"""


@contextmanager
def started(script: str, *arguments: object) -> "Iterator[tuple[subprocess.Popen[str], IO[str]]]":
    """A child process and its standard output; killed at the latest when the block ends."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert child.stdout is not None
    with child, child.stdout as lines:
        try:
            yield child, lines
        finally:
            child.kill()


def check_rows(root: Path, table: TableSpec, acknowledged: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Compare every live row with what it must be; return the live range of each environment."""
    view = TableView(root, table, 1)
    found: dict[int, tuple[int, int]] = {}
    for (_, env), runs in view.index.streams.items():
        at = runs.lo
        for piece in runs.pieces(runs.lo, runs.hi - runs.lo):
            rows = slice(piece.first, piece.first + piece.rows)
            wanted = synthetic.rows(table, StreamId(actor=0, env=env), at, piece.rows)
            arrays = {**piece.home.segment.columns, **piece.home.segment.overlay}
            for name, values in wanted.columns.items():
                flat = arrays[name].reshape(-1, *values.shape[1:])
                np.testing.assert_array_equal(flat[rows], values, err_msg=f"{name} of row {at}")
            at += piece.rows
        found[env] = (runs.lo, runs.hi)
        assert runs.hi >= acknowledged.get(env, 0)
    return found


@pytest.mark.parametrize("capacity", [65_536, 512], ids=["keeping", "evicting"])
def test_no_acknowledged_row_is_lost_or_torn_when_the_owner_is_killed(tmp_path: Path, capacity: int) -> None:
    rng = random.Random(capacity)
    acknowledged: dict[int, int] = {}
    for life in range(4):
        with started(WRITER, tmp_path, capacity, life) as (child, lines):
            opened = lines.readline().split()
            assert int(opened[1]) >= sum(acknowledged.values())
            for _ in range(rng.randrange(1, 40)):
                env, stored = map(int, lines.readline().split())
                acknowledged[env] = stored
            child.send_signal(signal.SIGKILL)
            for line in lines.read().splitlines():  # acknowledged before the blow, read after it
                if len(parts := line.split()) == 2:
                    acknowledged[int(parts[0])] = int(parts[1])
            assert child.wait() == -signal.SIGKILL
        check_rows(tmp_path, TABLE, acknowledged if capacity > 512 else {})
    with closing(ReplayShard(tmp_path, 0, TABLE, capacity_rows=capacity)) as shard:
        found = check_rows(tmp_path, TABLE, acknowledged)
        if len(found) == 3:  # positions never restart, so they add up to the lifetime counter
            assert shard.stats().inserted == sum(hi for _, hi in found.values())
        if capacity > 512:
            assert all(lo == 0 for lo, _ in found.values())


SEALER = WRITER.replace("capacity_rows=capacity", "capacity_rows=capacity, segment_rows=128")


def test_kills_while_segments_are_sealed_and_verified_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random(5)
    acknowledged: dict[int, int] = {}
    for life in range(6):
        with started(SEALER, tmp_path, 65_536, life) as (child, lines):
            lines.readline()
            for _ in range(rng.randrange(1, 60)):
                env, stored = map(int, lines.readline().split())
                acknowledged[env] = stored
            child.send_signal(signal.SIGKILL)
            for line in lines.read().splitlines():
                if len(parts := line.split()) == 2:
                    acknowledged[int(parts[0])] = int(parts[1])
            child.wait()
        served = damage.read_all(tmp_path, TABLE)
        assert not served.wrong
        for env, stored in acknowledged.items():
            assert served.numbers[0, env] >= set(range(stored))
    directory = layout.shard_dir(tmp_path, 0)
    assert any(seal.is_sealed(path) for path in layout.segment_paths(directory).values())
    assert not quarantined(directory)


def test_rows_sent_over_the_wire_arrive_once_through_kills_of_the_shard(tmp_path: Path) -> None:
    rng = random.Random(1)
    address, sent, stored = "127.0.0.1:0", 0, 0
    writer: GrpcReplayWriter | None = None
    for _ in range(3):
        with started(SERVER, tmp_path, address) as (_, lines):
            address = lines.readline().strip()
            writer = writer or GrpcReplayWriter(address, TABLE)
            for _ in range(rng.randrange(2, 30)):
                chunk = synthetic.rows(TABLE, StreamId(actor=0, env=0), sent, 40)
                stored += writer.append([chunk], 30.0).committed
                sent += 40
    assert writer is not None
    writer.close()
    assert stored == sent
    assert check_rows(tmp_path, TABLE, {0: sent}) == {0: (0, sent)}
