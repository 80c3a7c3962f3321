"""What a checkpoint store survives: kill -9 in the middle of a save, a disk that fills up, no permission."""

import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from learner.checkpoint import CheckpointStore
from system.errors import PreflightError
from tests.unit.learner.checkpoint_states import some_state

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


SAVER = """
import sys
from pathlib import Path
import numpy as np
from learner.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), keep=2)
for step in range(int(sys.argv[2]), 100_000):
    store.save(step, {"step": step, "a": np.full(300_000, step), "b": {"c": np.full(7, step)}}, {})
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_of_a_save_loses_nothing_that_was_saved(tmp_path: Path):
    rng = random.Random(3)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    first = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(store.root), str(first)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        saved = int(process.stdout.readline())  # saving has begun: kill it somewhere inside
        killer = threading.Timer(rng.uniform(0, 0.05), process.send_signal, (signal.SIGKILL,))
        killer.start()
        rest = [int(line) for line in process.stdout.read().splitlines()]
        assert process.wait(30) == -signal.SIGKILL
        process.stdout.close()
        killer.join()
        loaded = store.newest()
        assert loaded.step >= max([saved, *rest])
        assert loaded.state["step"] == loaded.step
        assert set(loaded.state["a"]) == set(loaded.state["b"]["c"]) == {loaded.step}
        first = loaded.step + 1
    store.save(first, {"step": first}, {})
    assert sorted(store.root.iterdir()) == store.paths()  # what the kills left behind was swept


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from learner.checkpoint import CheckpointStore
from system.errors import PreflightError

store = CheckpointStore(Path(sys.argv[1]), keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    store.save(2, {"a": np.ones(1 << 20)}, {})
except PreflightError as error:
    print(error)
"""


def test_a_write_that_fails_midway_is_a_clear_error_and_leaves_nothing(store: CheckpointStore):
    kept = store.save(1, some_state(1), {"signature": {}})
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(store.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "cannot write checkpoints" in done.stdout, done.stderr
    assert "earlier checkpoints are untouched" in done.stdout
    assert list(store.root.iterdir()) == [kept]
    assert store.newest().step == 1


def test_too_little_space_is_seen_before_anything_is_written(store: CheckpointStore):
    kept = store.save(1, some_state(1), {"signature": {}})
    free = shutil.disk_usage(store.root).free
    endless = np.broadcast_to(np.float32(0), (free // 4 + 1,))  # costs no memory
    with pytest.raises(PreflightError, match="are needed"):
        store.save(2, {"a": endless}, {"signature": {}})
    assert list(store.root.iterdir()) == [kept]


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PreflightError, match="cannot write checkpoints"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1)
