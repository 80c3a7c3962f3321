"""A disk that takes no more: back-pressure and a clear error, no crash; work goes on when there is room."""

import subprocess
import sys
from pathlib import Path

import pytest

from replay import synthetic
from replay.shard import ReplayShard
from system.experience import StreamId

ROOT = Path(__file__).parents[3]

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


SMALL_DISK = """
import gc, sys
from pathlib import Path
from bench import damage
from replay import synthetic
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import PreflightError
from system.experience import StreamId

root = Path(sys.argv[1])
table = synthetic.image_table(size=16)
stream = StreamId(actor=0, env=0)
sent = 0

def send(shard, rows):
    global sent
    for _ in range(0, rows, 64):
        shard.append([synthetic.rows(table, stream, sent, 64)], 0.5)
        sent += 64

shard = ReplayShard(root / "r", 0, table, capacity_rows=1 << 20, segment_rows=1024)
try:
    while True:
        send(shard, 64)
except PreflightError as error:
    assert "free disk space" in str(error), error
print("full at", sent)
assert damage.read_all(root / "r", table).rows >= sent
shard.close()
del shard
gc.collect()  # evicted files give their blocks back when nobody maps them any more

shard = ReplayShard(root / "r", 0, table, capacity_rows=4096, segment_rows=1024)
hog = (root / "hog").open("wb", buffering=0)
try:
    while hog.write(bytes(1 << 12)):
        pass
except OSError:
    pass
send(shard, 1024)  # evicting needs the ledger written, on a disk without a free block
try:
    send(shard, 20_000)
except PreflightError:
    pass
view = TableView(root / "r", table, 1)
for shard_view in view.views:
    assert shard_view.rows
hog.truncate(0)
send(shard, 4096)
served = damage.read_all(root / "r", table)
assert not served.wrong, served.wrong
assert shard.settle(20.0)
assert served.rows <= 4096 and shard.stats().inserted >= sent
shard.close()
print("done")
"""


def test_a_small_disk_fills_up_and_work_goes_on_when_there_is_room(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=12m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable]
    probe = subprocess.run([*command, "pass"], capture_output=True, text=True, timeout=60, check=False)
    if probe.returncode:
        pytest.skip(f"no private mounts here: {probe.stderr.strip()}")
    done = subprocess.run(
        [*command, SMALL_DISK], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "done"


READ_ONLY = """
import sys
from pathlib import Path
from replay import synthetic
from replay.shard import ReplayShard
from system.errors import PreflightError

try:
    ReplayShard(Path(sys.argv[1]) / "r", 0, synthetic.vector_table(), capacity_rows=1024)
except PreflightError as error:
    print("refused", error)
"""


def test_a_read_only_disk_is_refused_by_name(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path / "r", 0, synthetic.vector_table(), capacity_rows=1024)
    shard.append([synthetic.rows(synthetic.vector_table(), StreamId(actor=0, env=0), 0, 10)], 5.0)
    shard.close()
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable]
    probe = subprocess.run([*command, "pass"], capture_output=True, text=True, timeout=60, check=False)
    if probe.returncode:
        pytest.skip(f"no private mounts here: {probe.stderr.strip()}")
    done = subprocess.run(
        [*command, READ_ONLY], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("refused replay directory")


def test_a_full_disk_holds_rows_back_and_says_what_is_needed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, sampled, end = done.stdout.splitlines()
    assert "cannot make replay segment" in refused
    assert "free disk space" in refused
    assert sampled in ("sampled at 256", "sampled at 512")  # the next one may have been made in time
    assert end == "done"
    assert not any((tmp_path / "shard-0000" / ".scratch").iterdir())
