"""How fast batches come out of a replay in memory, beside memcpy of as many bytes out of as much memory.

In memory means in the page cache, so the files are read once right before; `major_faults` tells how often
the kernel had taken a page back (one that reclaims idle memory does so after half a minute).
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.load import Load, Row, Samples, repeat, timed
from bench.peers.workload import BATCH, CONTEXT, LENGTH, RING, Memcpy
from bench.replay_feed import TIMEOUT, fill_shard
from replay import synthetic
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.shard import ReplayShard
from system.specs import TableSpec


def open_reader(root: Path, table: TableSpec, seed: int = 0) -> LocalReader:
    """A reader that no limiter holds back, with batches as every replay here is measured with."""
    return LocalReader(
        root,
        table,
        batch=BATCH,
        length=LENGTH,
        context=CONTEXT,
        seed=seed,
        limiter=RateLimiter(1e9, 1, 1 << 40, 1),
        controls=[],
        ring=RING,
    )


def sample_rows(root: Path, gigabytes: float, seconds: float) -> Iterator[Row]:
    table = synthetic.image_table()
    wanted = int(gigabytes * 1e9 / table.row_nbytes)
    with closing(ReplayShard(root, 0, table, capacity_rows=2 * wanted)) as shard:
        with Load() as load:
            spent = fill_shard(shard, table, wanted)
        filled = Samples(values=(wanted / spent,), foreign_load=load.foreign, cpu_per_wall=load.cpu_per_wall)
        case = f"image {gigabytes:g}GB"
        yield filled.row("replay", case, "append_rate", "rows/s")
        reader = open_reader(root, table)
        with closing(reader):
            read_files(root)
            nbytes = sum(array.nbytes for array in reader.sample(TIMEOUT).columns.values())
            copy = Memcpy(nbytes, int(gigabytes * 1e9 / nbytes))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            yield from compare(case, nbytes, lambda: reader.sample(TIMEOUT), copy, seconds)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
            yield Row(bench="replay", case=case, metric="major_faults", value=faults, unit="faults")


def read_files(root: Path) -> None:
    """Bring every file of a replay into the page cache."""
    block = bytearray(4 << 20)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def compare(
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
