"""How fast batches come out of compressed segments of real Atari frames, beside memcpy of as many bytes.

Frames are 64x64 RGB under random play: what compresses in them compresses in a run's replay as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from actors.actor import Actor
from actors.envs.catalog import make_env
from actors.random_policy import RandomPolicy
from bench.load import Row
from bench.peers.workload import Memcpy
from bench.replay_feed import CHUNK_ROWS, TIMEOUT
from bench.replay_sampling import compare, open_reader
from replay import layout
from replay.shard import ReplayShard
from replay.tiers import stages_of
from system.errors import InfrastructureError
from system.params.memory import MemoryWeights
from system.specs import TableSpec

GAMES = ("MsPacman-v5", "Pong-v5")
FRAMES = {"img_height": 64, "img_width": 64, "gray_scale": False, "stack_num": 1}
ENVS = 8
SETTLE_SECONDS = 300.0


def cold_rows(root: Path, gigabytes: float, seconds: float) -> Iterator[Row]:
    """Per game: shrink (raw bytes over compressed bytes), memcpy_rate and sample_rate (ratio to it)."""
    for game in GAMES:
        place = root / game
        table = collect(place, game, int(gigabytes * 1e9 / (64 * 64 * 3)))
        case = f"{game.removesuffix('-v5')} cold {gigabytes:g}GB"
        raw, cold = _compress(place, table)
        yield Row(bench="replay", case=case, metric="shrink", value=raw / cold, unit="x")
        reader = open_reader(place, table)
        with closing(reader):
            if not reader.settle(SETTLE_SECONDS):
                raise InfrastructureError("segments were not verified in time; the disk is too slow")
            nbytes = sum(array.nbytes for array in reader.sample(TIMEOUT).columns.values())
            copy = Memcpy(nbytes, max(1, int(gigabytes * 1e9 / nbytes)))
            yield from compare(case, nbytes, lambda reader=reader: reader.sample(TIMEOUT), copy, seconds)


def collect(root: Path, game: str, count: int) -> TableSpec:
    """About `count` rows of random play in the shard at `root`."""
    env = make_env(f"envpool:{game}", ENVS, options=FRAMES)
    table = TableSpec.of(env.spec)
    policy = RandomPolicy(env.spec.action, 0)
    with closing(ReplayShard(root, 0, table, capacity_rows=2 * count)) as shard:
        actor = Actor(0, 0, env, policy, shard, MemoryWeights(), table=table, seed=0, chunk_rows=CHUNK_ROWS)
        while shard.stats().inserted < count:
            actor.run(1.0)
        actor.close()
    return table


def _compress(root: Path, table: TableSpec) -> tuple[int, int]:
    """Seal and compress all segments of a shard whose writer is gone; bytes before and after."""
    directory = layout.shard_dir(root, 0)
    before = _nbytes(directory)
    stages = stages_of(directory, 0, table, compress=True, cold_after=0, far=None, far_after=0)
    rows = 2 * before // table.row_nbytes
    with closing(ReplayShard(root, 0, table, capacity_rows=rows, stages=stages)) as shard:
        if not shard.settle(SETTLE_SECONDS):
            raise InfrastructureError("segments were not compressed in time; the disk is too slow")
    return before, _nbytes(directory)


def _nbytes(directory: Path) -> int:
    """Bytes of all segments on disk; blocks that are reserved but hold no rows do not count."""
    files = (path for path in directory.glob("*.zarr/**/*") if path.is_file())
    return sum(512 * path.stat().st_blocks for path in files)
