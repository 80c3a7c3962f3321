"""SIGKILL of giver, taker and mover at random moments: every row is served once, counts stay, moves end."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from replay import layout, move, synthetic
from replay.shard import ReplayShard
from replay.view import TableView
from system.experience import StreamId

TABLE = synthetic.vector_table()
ENVS = 3

MOVER = """
import random, sys
from pathlib import Path
from replay import layout, move, synthetic
from replay.shard import ReplayShard
from system.errors import DreamfleetError
from system.experience import StreamId

root, seed = Path(sys.argv[1]), int(sys.argv[2])
table = synthetic.vector_table()
rng = random.Random(seed)
shards = [ReplayShard(root, n, table, capacity_rows=65536, segment_rows=256) for n in range(3)]
at = {(s.index, e): 0 for s in shards for e in range(3)}
for s in shards:
    for key, cursor in s._log.cursors.items():
        at[s.index, key & 0xFFFF] = cursor.position
while True:
    shard, env, count = rng.choice(shards), rng.randrange(3), rng.randrange(1, 80)
    key = shard.index, env
    shard.append([synthetic.rows(table, StreamId(actor=key[0], env=env), at[key], count)], 10.0)
    at[key] += count
    print(*key, at[key], flush=True)
    source, target = rng.sample(shards, 2)
    sealed = source.sealed()
    if sealed and sealed[0].origin != target.index:
        move.move(source, target, sealed[0])
        print("moved", flush=True)
"""


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def check_rows(root: Path) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Compare every live row with what it must be; return the live ranges of each (shard, env)."""
    view = TableView(root, TABLE, 1)
    assert view.settle(30.0)
    found = {}
    for (shard, stream), runs in view.index.streams.items():
        found[shard, stream & 0xFFFF] = list(runs.bounds)
        for lo, hi in runs.bounds:
            at = lo
            for piece in runs.pieces(lo, hi - lo):
                wanted = synthetic.rows(TABLE, StreamId(actor=shard, env=stream & 0xFFFF), at, piece.rows)
                for name, array in piece.home.segment.columns.items():
                    flat = array.reshape(-1, *array.shape[2:])
                    rows = flat[piece.first : piece.first + piece.rows]
                    np.testing.assert_array_equal(rows, wanted.columns[name], err_msg=f"{name} of row {at}")
                at += piece.rows
    view.release()
    return found


@pytest.mark.drill
def test_kills_during_moves_lose_no_row_and_double_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    acknowledged: dict[tuple[int, int], int] = {}
    moved = 0
    for life in range(6):
        command = [sys.executable, "-c", MOVER, str(tmp_path), str(life)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
        ) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(int(rng.integers(40, 200)))]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        for words in (line.split() for line in lines if line.endswith("\n")):
            moved += words == ["moved"]
            if len(words) == 3:
                acknowledged[int(words[0]), int(words[1])] = int(words[2])
        found = check_rows(tmp_path)
        for key, count in acknowledged.items():
            assert len(found[key]) == 1, (key, found[key])
            assert found[key][0][0] == 0
            assert found[key][0][1] >= count
    assert moved > 20
    shards = [ReplayShard(tmp_path, n, TABLE, capacity_rows=65536, segment_rows=256) for n in range(3)]
    total = sum(hi for bounds in check_rows(tmp_path).values() for _, hi in bounds)
    assert sum(shard.stats().inserted for shard in shards) == total
    assert sum(shard.stats().rows for shard in shards) == total  # every cut-off move was finished
    for shard in shards:
        assert shard.settle(30.0)
        shard.close()
    for n in range(3):
        own = [s.stem for s in layout.stored_segments(layout.shard_dir(tmp_path, n), n)]
        assert not any(move.holders(tmp_path, n, stem) for stem in own)


def test_a_shard_that_was_killed_is_taken_over_without_it(tmp_path: Path) -> None:
    from replay.adoption import adopt_shard

    command = [sys.executable, "-c", MOVER, str(tmp_path), "7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as child:
        assert child.stdout is not None
        for _ in range(150):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.stdout.read()
    before = check_rows(tmp_path)
    with closing(ReplayShard(tmp_path, 2, TABLE, capacity_rows=65536)) as target:
        for dead in (0, 1):
            adopt_shard(tmp_path, dead, TABLE, target, room_rows=65536, timeout=30.0)
        assert check_rows(tmp_path) == before
