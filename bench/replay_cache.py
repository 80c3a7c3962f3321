"""How fast batches come from disk when nothing of the replay is in the page cache.

Files are dropped from the cache before each round, and a round reads a small part of them, so that
hardly any page is met twice. Compared with reading the same files from end to end, dropped likewise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from bench.load import Load, Row, Samples
from bench.replay_feed import TIMEOUT
from bench.replay_sampling import open_reader
from replay import synthetic
from replay.reader import LocalReader
from system.errors import InfrastructureError

ROOT = Path(__file__).resolve().parent.parent
PART = 0.15
"""Share of the bytes that one round samples."""
BLOCK = 4 << 20
FILL = "from bench.replay_cache import fill; fill({root!r}, {gigabytes!r})"


def cache_rows(root: Path, gigabytes: float, rounds: int) -> Iterator[Row]:
    """disk_rate (sequential read of the files) and cold_sample_rate (ratio to it)."""
    command = [sys.executable, "-c", FILL.format(root=str(root), gigabytes=gigabytes)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise InfrastructureError("the replay for the cold-cache bench could not be filled; see above")
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size >= BLOCK)
    total = sum(path.stat().st_size for path in files)
    disk: list[float] = []
    sampled: list[float] = []
    with Load() as load:
        for _ in range(rounds):
            drop_cache(files)
            disk.append(_read_all(files) / 1e9)
            drop_cache(files)
            sampled.append(_sample(root, files, int(total * PART)) / 1e9)
    for name, rates in (("disk_rate", disk), ("cold_sample_rate", sampled)):
        samples = Samples(values=tuple(rates), foreign_load=load.foreign, cpu_per_wall=load.cpu_per_wall)
        more = {"ratio": samples.median / _median(disk), "ratio_to": "disk"} if rates is sampled else {}
        yield samples.row("replay", f"image {gigabytes:g}GB uncached", name, "GB/s", **more)


def fill(root: str, gigabytes: float) -> None:
    """Child process: a replay on disk, its pages clean and not mapped by anyone."""
    from bench.replay_feed import fill_shard
    from replay.shard import ReplayShard

    table = synthetic.image_table()
    wanted = int(gigabytes * 1e9 / table.row_nbytes)
    with closing(ReplayShard(Path(root), 0, table, capacity_rows=2 * wanted)) as shard:
        fill_shard(shard, table, wanted)
        shard.flush()


def drop_cache(files: list[Path]) -> None:
    """Ask the kernel to forget clean pages of files that nobody maps."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read_all(files: list[Path]) -> float:
    """Bytes per second of reading the files one after the other."""
    buffer = bytearray(BLOCK)
    begun, total = time.perf_counter(), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - begun)


def _sample(root: Path, files: list[Path], nbytes: int) -> float:
    """Bytes per second of batches until `nbytes` were drawn; opening and verifying do not count."""
    reader = open_reader(root, synthetic.image_table(), seed=time.time_ns() % 2**31)
    with closing(reader):
        settle(reader)
        drop_cache(files)
        drawn, begun = 0, time.perf_counter()
        while drawn < nbytes:
            drawn += sum(array.nbytes for array in reader.sample(TIMEOUT).columns.values())
        return drawn / (time.perf_counter() - begun)


def settle(reader: LocalReader) -> None:
    """Wait until verification has let in all rows."""
    rows, since = -1, time.monotonic()
    while time.monotonic() - since < 2.0:
        reader.pump()
        if reader.counts()[1] != rows:
            rows, since = reader.counts()[1], time.monotonic()
        time.sleep(0.05)


def _median(values: list[float]) -> float:
    return Samples(values=tuple(values), foreign_load=0.0, cpu_per_wall=0.0).median
