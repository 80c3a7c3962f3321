"""Sudden death while a learner pins, prunes and overwrites, and while a restore runs: nothing is lost.

A life appends, overwrites and takes checkpoints for ever, and writes down what a checkpoint must look like.
After any death, and any number of broken restores, restoring gives exactly that.
"""

import json
import random
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from replay.cut import Cut
from replay.pins import HELD, PINS, PinStore, pins_of
from replay.restore import restore_exact

KEEP = 2
ROOT = Path(__file__).parents[3]

COMMON = """
import hashlib, json, random, signal, sys
from pathlib import Path
import numpy as np
from replay import synthetic
from replay.cut import Cut
from replay.pins import PinStore
from replay.restore import restore_exact
from replay.shard import ReplayShard
from replay.rows import write_overlay
from replay.view import TableView
from system.experience import SequenceIds, StreamId, WriteBack

root = Path(sys.argv[1])
if float(sys.argv[2]):  # whoever does not catch this signal dies of it on the spot
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
table = synthetic.vector_table()

def digest(view):
    found = hashlib.sha256()
    for key, runs in sorted(view.index.streams.items()):
        for piece in runs.pieces(runs.lo, runs.hi - runs.lo):
            rows = slice(piece.first, piece.first + piece.rows)
            found.update(repr((key, runs.lo, runs.hi)).encode())
            for arrays in (piece.home.segment.columns, piece.home.segment.overlay):
                for name, array in arrays.items():
                    found.update(array.reshape(-1, *array.shape[2:])[rows].tobytes())
    return found.hexdigest()
"""

LIFE = (
    COMMON
    + """
rng = random.Random(int(sys.argv[3]))
shard = ReplayShard(root / "replay", 0, table, capacity_rows=1024, segment_rows=128)
pins = PinStore(root / "replay", hold=True)
view = TableView(root / "replay", table, 1)
assert view.settle(20.0)
life = shard.stats().epoch
sent = {}
saves = sorted((root / "checkpoints").glob("*.json"))
number = int(saves[-1].stem) if saves else 0
while True:
    for _ in range(rng.randrange(1, 4)):
        env, count = rng.randrange(3), rng.randrange(1, 90)
        start = sent.get(env, 0)
        stream = StreamId(actor=0, env=env)
        shard.append([synthetic.rows(table, stream, start, count, incarnation=life)], 10.0)
        sent[env] = start + count
    view.refresh()
    for (index, stream), runs in view.index.streams.items():
        at, count = rng.randrange(runs.lo, runs.hi), 20
        ids = SequenceIds(shard=np.asarray([index], np.int32), stream=np.asarray([stream], np.int32),
                          start=np.asarray([at], np.int64))
        latent = np.full((1, count, 2), rng.randrange(1 << 16), np.uint16)
        write_overlay(table, view.index, WriteBack(ids=ids, offset=0, columns={"latent": latent}),
                      before=pins.before)
    if rng.random() < 0.5:
        number += 1
        cut = pins.take(f"{number:06d}")
        draft = root / "checkpoints" / ".draft"
        draft.write_text(json.dumps({"cut": cut, "digest": digest(view)}))
        draft.rename(root / "checkpoints" / f"{number:06d}.json")
        saves = sorted((root / "checkpoints").glob("*.json"))
        for old in saves[:-2]:
            old.unlink()
        pins.prune([path.stem for path in saves[-2:]])
"""
)

RESTORE = (
    COMMON
    + """
saves = sorted((root / "checkpoints").glob("*.json"))
restore_exact(root / "replay", saves[-1].stem, Cut.from_json(json.loads(saves[-1].read_text())["cut"]))
"""
)


DIGEST = (
    COMMON
    + """
shard = ReplayShard(root / "replay", 0, table, capacity_rows=1024, segment_rows=128)
view = TableView(root / "replay", table, 1)
assert view.settle(20.0)
print(digest(view))
view.release()
shard.close()
"""
)


def run(script: str, root: Path, dies_after: float = 0.0, seed: int = 0) -> str:
    """What a child prints; it dies `dies_after` seconds behind its imports, or ends by itself."""
    command = [sys.executable, "-c", script, str(root), str(dies_after), str(seed)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    allowed = (0, -signal.SIGALRM) if dies_after else (0,)
    assert child.returncode in allowed, child.stderr
    return child.stdout.strip()


def newest(root: Path, back: int = 0) -> tuple[str, Cut, str]:
    path = sorted((root / "checkpoints").glob("*.json"))[-1 - back]
    value = json.loads(path.read_text())
    return path.stem, Cut.from_json(value["cut"]), value["digest"]


@pytest.mark.drill
def test_checkpoints_stay_restorable_whenever_the_learner_is_killed(tmp_path: Path) -> None:
    rng = random.Random(3)
    (tmp_path / "checkpoints").mkdir()
    for life in range(5):
        run(LIFE, tmp_path, 0.3 + rng.random(), life)
        held = {entry.name for entry in (tmp_path / "replay" / PINS / HELD).iterdir()}
        for pin in pins_of(tmp_path / "replay"):
            assert pin.held <= held
        saves = {path.stem for path in (tmp_path / "checkpoints").glob("*.json")}
        assert saves <= {pin.checkpoint for pin in pins_of(tmp_path / "replay")}
        if life % 2 == 0:  # the others go on from where the death left it
            name, cut, wanted = newest(tmp_path, back=life // 2 % KEEP)
            restore_exact(tmp_path / "replay", name, cut)
            for path in (tmp_path / "checkpoints").glob("*.json"):
                if path.stem > name:
                    path.unlink()
            assert run(DIGEST, tmp_path) == wanted
    with closing(PinStore(tmp_path / "replay", hold=True)) as pins:
        pins.prune([path.stem for path in (tmp_path / "checkpoints").glob("*.json")])
        left = {entry.name for entry in (tmp_path / "replay" / PINS / HELD).iterdir()}
        assert left == set().union(*(pin.held for pin in pins_of(tmp_path / "replay")))


def test_a_restore_that_was_killed_is_simply_run_again(tmp_path: Path) -> None:
    rng = random.Random(4)
    (tmp_path / "checkpoints").mkdir()
    run(LIFE, tmp_path, 1.0, 9)
    name, cut, wanted = newest(tmp_path)
    for _ in range(5):
        run(RESTORE, tmp_path, 0.001 + 0.06 * rng.random())
    restore_exact(tmp_path / "replay", name, cut)
    assert run(DIGEST, tmp_path) == wanted
