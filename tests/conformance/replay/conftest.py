import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from replay.client import GrpcReplayWriter, GrpcShardControl
from replay.memory import MemoryReplay
from replay.reader import LocalReader
from replay.service import serve_shard
from replay.shard import ReplayShard
from tests.conformance.replay.replays import TABLE, Open, Pair, settings

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room: segments are many files, slow to unlink on some disks."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < 512 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.fixture(params=["memory", "local", "grpc"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    @contextmanager
    def memory(**changes: Any) -> Iterator[Pair]:
        replay = MemoryReplay(TABLE, **settings(**changes))
        yield Pair(replay, replay)

    @contextmanager
    def local(**changes: Any) -> Iterator[Pair]:
        chosen = settings(**changes)
        capacity = chosen.pop("capacity_rows")
        shard = ReplayShard(tmp_path / "replay", 0, TABLE, capacity_rows=capacity, initial_grant=0)
        with (
            closing(shard),
            closing(LocalReader(tmp_path / "replay", TABLE, controls=[shard], **chosen)) as reader,
        ):
            reader.pump()
            yield Pair(shard, reader)

    @contextmanager
    def grpc(**changes: Any) -> Iterator[Pair]:
        chosen = settings(**changes)
        capacity = chosen.pop("capacity_rows")
        shard = ReplayShard(tmp_path / "replay", 0, TABLE, capacity_rows=capacity, initial_grant=0)
        with closing(shard), ExitStack() as stack:
            server = serve_shard(shard, "127.0.0.1:0")
            stack.callback(server.stop, 0)
            control = stack.enter_context(closing(GrpcShardControl(server.address)))
            writer = stack.enter_context(closing(GrpcReplayWriter(server.address, TABLE)))
            reader = LocalReader(tmp_path / "replay", TABLE, controls=[control], **chosen)
            stack.callback(reader.close)
            reader.pump()
            yield Pair(writer, reader)

    return {"memory": memory, "local": local, "grpc": grpc}[request.param]
