"""A disk that takes no more: back-pressure and a clear error, no crash; work goes on when there is room."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource, sys, threading
from pathlib import Path
from replay import synthetic
from replay.reader import LocalReader
from replay.limiter import RateLimiter
from replay.shard import ReplayShard
from system.errors import PreflightError
from system.experience import StreamId

root = Path(sys.argv[1])
table = synthetic.image_table(size=8)
stream = StreamId(actor=0, env=0)
shard = ReplayShard(root, 0, table, capacity_rows=2048, segment_rows=256)
shard.append([synthetic.rows(table, stream, 0, 256)], 10.0)  # one segment is there, the next is made ahead
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
sent = 256
try:
    while True:
        shard.append([synthetic.rows(table, stream, sent, 64)], 0.5)
        sent += 64
except PreflightError as error:
    print("refused", error)
assert shard.stats().wait_seconds > 0.3
reader = LocalReader(root, table, batch=2, length=8, context=0, seed=0,
                     limiter=RateLimiter(100.0, 0, 10**6, 1), controls=[shard])
reader.sample(1.0)
print("sampled at", sent)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
shard.append([synthetic.rows(table, stream, sent, 300)], 10.0)
assert shard.stats().inserted == sent + 300
shard.close()
print("done")
"""


def test_a_full_disk_holds_rows_back_and_says_what_is_needed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, sampled, end = done.stdout.splitlines()
    assert "cannot make replay segment" in refused
    assert "free disk space" in refused
    assert sampled in ("sampled at 256", "sampled at 512")  # the next one may have been made in time
    assert end == "done"
    assert not any((tmp_path / "shard-0000" / ".scratch").iterdir())
