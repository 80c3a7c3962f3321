import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from replay import cold, layout, seal, synthetic
from replay.segment import Geometry, Segment, SegmentFormat
from system.experience import StreamId
from system.specs import TableSpec

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room: segments are many files, slow to unlink on some disks."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < 512 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


TABLE = synthetic.image_table(16)
USED = (256, 100, 0)
"""Committed rows of the slots of `sealed_segment`."""


def _frames(count: int) -> np.ndarray:
    """A bright square that moves over a still, noisy background [count, 16, 16, 3]: shrinks like a game's."""
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), count, 0)
    for t in range(count):
        images[t, t % 12 : t % 12 + 4, 3 * t % 12 : 3 * t % 12 + 4] = 255
    return images


def _sealed_segment(
    directory: Path, table: TableSpec = TABLE, *, number: int = 7, noisy: bool = False
) -> Segment:
    """A published, sealed raw segment; slot s holds stream s from position 1000 * s on."""
    (directory / layout.SCRATCH).mkdir(parents=True, exist_ok=True)
    segment = SegmentFormat(table, Geometry(slots=len(USED), rows=256)).create(
        directory, number, 1, number - 1
    )
    for slot, used in enumerate(USED):
        if not used:
            continue
        columns = dict(synthetic.rows(table, StreamId(actor=0, env=slot), 0, used).columns)
        if not noisy:
            columns["image"] = _frames(used)
        segment.slots[slot] = (0, slot, 1000 * slot)
        for start in range(0, used, 40):
            segment.append(slot, start, columns, start, min(start + 40, used))
    segment.publish(directory)
    seal.seal(
        segment.path,
        seal.Manifest(
            name=segment.path.name.removesuffix(".zarr"),
            tier="raw",
            schema=table.digest,
            replay="test",
            origin=0,
            number=number,
            epoch=1,
            rows=256,
            committed=USED,
            slots=tuple((a, e, p) for a, e, p in segment.slots.tolist()),
            last=((0, 0, 0, 0),) * len(USED),
            files={},
        ),
    )
    return segment


def _make_cold(directory: Path, segment: Segment, table: TableSpec = TABLE) -> Path:
    final = layout.tier_path(segment.path, "cold")
    draft = directory / layout.SCRATCH / final.name
    cold.write_cold(segment, table, cold.plan_codecs(segment), draft).rename(final)
    return final


@pytest.fixture
def table() -> TableSpec:
    return TABLE


@pytest.fixture
def sealed_segment() -> Callable[..., Segment]:
    """Makes a published, sealed raw segment of `table`: sealed_segment(directory, number=7, noisy=False)."""
    return _sealed_segment


@pytest.fixture
def make_cold() -> Callable[..., Path]:
    """Makes the cold form beside a sealed raw segment: make_cold(directory, segment)."""
    return _make_cold


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """The directory of shard 0."""
    return layout.shard_dir(tmp_path, 0)
