"""One sampler over all tiers: whatever a segment has become, the same seed draws the same batches."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from replay import layout, synthetic
from replay.far import FarShelf
from replay.limiter import RateLimiter
from replay.object_store import open_store
from replay.quarantine import quarantined
from replay.reader import LocalReader
from replay.segment import data_path
from replay.shard import ReplayShard
from replay.tiers import stages_of
from system.experience import Chunk, Columns, StreamId

TABLE = synthetic.image_table(16)
CAPACITY = 4096
SEGMENT_ROWS = 256
ENVS = 3


def rows(env: int, start: int, count: int) -> Chunk:
    """Rows as `synthetic.rows`, but with images that shrink like a game's."""
    chunk = synthetic.rows(TABLE, StreamId(actor=0, env=env), start, count)
    image = np.repeat(np.arange(16 * 16 * 3, dtype=np.uint32)[None] * 2654435761 >> 24, count, 0).astype(
        np.uint8
    )
    for i in range(count):
        at = (start + i) * 13 % 700
        image[i, at : at + 40] = (start + i) % 251 + env
    return Chunk(stream=chunk.stream, columns={**chunk.columns, "image": image.reshape(count, 16, 16, 3)})


def check(columns: Columns, streams: np.ndarray, starts: np.ndarray) -> None:
    """Every byte of a batch is what was sent, latents apart."""
    for b, (stream, start) in enumerate(zip(streams.tolist(), starts.tolist(), strict=True)):
        wanted = rows(stream & 0xFFFF, start, len(columns["reward"][b])).columns
        for name in ("image", "vector", "action", "step", "episode"):
            np.testing.assert_array_equal(
                columns[name][b], wanted[name], err_msg=f"{name} of {stream} {start}"
            )


def open_shard(
    root: Path, far: str | None = None, *, staged: bool = True, capacity: int = CAPACITY
) -> ReplayShard:
    directory = layout.shard_dir(root, 0)
    stages = (
        stages_of(directory, 0, TABLE, compress=True, cold_after=2, far=far, far_after=5) if staged else []
    )
    return ReplayShard(root, 0, TABLE, capacity_rows=capacity, segment_rows=SEGMENT_ROWS, stages=stages)


def open_reader(root: Path, seed: int = 0) -> LocalReader:
    limiter = RateLimiter(1e6, 0, 10**9, 1)
    return LocalReader(root, TABLE, batch=8, length=60, context=5, seed=seed, limiter=limiter, controls=[])


def fill(shard: ReplayShard, first: int, last: int) -> None:
    for start in range(first, last, 40):
        for env in range(ENVS):
            shard.append([rows(env, start, 40)], 10.0)


def draw(root: Path, batches: int, seed: int = 0) -> list[tuple[bytes, ...]]:
    """Batches as bytes, all columns but the overlay, each row checked."""
    reader = open_reader(root, seed)
    drawn = []
    for _ in range(batches):
        batch = reader.sample(20.0)
        check(batch.columns, batch.ids.stream, batch.ids.start)
        drawn.append(tuple(batch.columns[name].tobytes() for name in TABLE.all))
    reader.close()
    return drawn


def tiers(root: Path) -> Counter[str]:
    return Counter(s.tier for s in layout.stored_segments(layout.shard_dir(root, 0)))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a fresh bucket on an S3 server of this process; the environment leads there."""
    from moto.server import ThreadedMotoServer  # slow to import, and the writers below need none

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    name = f"replay-{os.getpid()}-{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{name}", method="PUT")).close()
    for key, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    yield f"s3://{name}/runs/one"
    server.stop()


def test_the_same_seed_draws_the_same_batches_whatever_the_tier(tmp_path: Path, bucket: str) -> None:
    shard = open_shard(tmp_path, staged=False)
    fill(shard, 0, 800)
    assert shard.settle(30.0)
    assert set(tiers(tmp_path)) == {"raw"}
    reference = draw(tmp_path, 12)
    shard.close()
    shard = open_shard(tmp_path, bucket)
    assert shard.settle(60.0)
    found = tiers(tmp_path)
    assert found["far"] >= 3
    assert found["cold"] == 3
    assert found["raw"] >= 2
    assert draw(tmp_path, 12) == reference
    shard.close()
    assert draw(tmp_path, 12) == reference  # without a living owner, after everything was checked
    shard = open_shard(tmp_path, bucket)
    fill(shard, 800, 840)
    assert shard.stats().inserted == ENVS * 840
    draw(tmp_path, 4, seed=5)
    shard.close()


def test_a_reader_follows_its_segments_through_the_tiers(tmp_path: Path, bucket: str) -> None:
    shard = open_shard(tmp_path, bucket)
    fill(shard, 0, 120)
    reader = open_reader(tmp_path)
    starts: Counter[tuple[int, int]] = Counter()
    for first in range(120, 800, 40):
        fill(shard, first, first + 40)
        batch = reader.sample(20.0)
        check(batch.columns, batch.ids.stream, batch.ids.start)
    assert shard.settle(60.0)
    assert tiers(tmp_path)["far"] >= 2
    for _ in range(160):
        batch = reader.sample(20.0)
        check(batch.columns, batch.ids.stream, batch.ids.start)
        starts.update(zip(batch.ids.stream.tolist(), (batch.ids.start // 46).tolist(), strict=True))
    legal = 800 - 64
    counts = [starts[env, b] for env in range(ENVS) for b in range(legal // 46)]
    assert len(starts) == len(counts)
    assert stats.chisquare(counts).pvalue > 1e-3
    reader.close()
    shard.close()


def test_evicting_deletes_the_objects(tmp_path: Path, bucket: str) -> None:
    shard = open_shard(tmp_path, bucket, capacity=2048)
    fill(shard, 0, 640)
    assert shard.settle(60.0)
    store = open_store(bucket)
    before = set(FarShelf(store, 0).catalog().segments)
    assert before
    fill(shard, 640, 1600)
    assert shard.settle(60.0)
    after = set(FarShelf(store, 0).catalog().segments)
    assert not before & after
    there = {
        key.split("/")[1].removesuffix(".cold.zarr") for key in store.keys("shard-0000") if ".cold." in key
    }
    assert there == after
    kept = {path.name.split(".")[0] for path in layout.shard_dir(tmp_path, 0).glob("*.kept")}
    assert {f"0000-{stem}" for stem in kept} == after
    shard.close()


@pytest.mark.parametrize("tier", ["cold", "far"])
def test_damage_met_by_a_reader_is_taken_out_by_the_owner(tmp_path: Path, bucket: str, tier: str) -> None:
    shard = open_shard(tmp_path, bucket)
    fill(shard, 0, 800)
    assert shard.settle(60.0)
    segments = [s for s in shard.sealed() if s.tier == tier]
    if tier == "cold":
        data = data_path(segments[0].path, "image", 5)
        spoiled = bytearray(data.read_bytes())
        spoiled[20::64] = bytes(len(spoiled[20::64]))
        data.write_bytes(spoiled)
    else:
        store = open_store(bucket)
        (key,) = [k for k in store.keys("shard-0000") if f"{segments[0].stem}.cold.zarr/image/c/" in k]
        store.put(key, bytes(len(store.get(key))))
    draw(tmp_path, 40)
    assert shard.settle(60.0)
    assert segments[0].stem not in [s.stem for s in shard.sealed()]
    assert len(quarantined(shard.directory)) == 1
    draw(tmp_path, 10)
    shard.close()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_replay_tiers import ENVS, open_shard, rows
shard = open_shard(Path(sys.argv[1]), sys.argv[2])
at = shard.stats().inserted // ENVS // 40 * 40
while True:
    for env in range(ENVS):
        shard.append([rows(env, at, 40)], 10.0)
    at += 40
    print(at, flush=True)
"""


@pytest.mark.drill
def test_kills_between_the_tiers_lose_no_row_and_double_none(tmp_path: Path, bucket: str) -> None:
    rng = np.random.default_rng(3)
    acknowledged = 0
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path), bucket, str(Path(__file__).parent)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
        ) as child:
            assert child.stdout is not None
            for _ in range(int(rng.integers(2, 12))):
                line = child.stdout.readline().strip()
                assert line, "the writer died by itself"
                acknowledged = int(line)
            child.send_signal(signal.SIGKILL)
            for line in child.stdout.read().splitlines():
                acknowledged = int(line) if line.isdigit() else acknowledged
        draw(tmp_path, 4) if acknowledged > 80 else None
    shard = open_shard(tmp_path, bucket)
    assert shard.settle(60.0)
    assert shard.stats().inserted >= ENVS * acknowledged
    assert shard.stats().rows == shard.stats().inserted
    assert tiers(tmp_path)["far"] > 0
    draw(tmp_path, 10)
    stems = [s.stem for s in layout.stored_segments(layout.shard_dir(tmp_path, 0))]
    assert len(stems) == len(set(stems))
    shard.close()
