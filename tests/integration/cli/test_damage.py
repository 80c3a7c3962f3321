"""Files that are damaged, foreign or full, and environments that break their word."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.drill import SCREEN_LINES, SHORT, Drill, Outcome
from deploy.audit import audit_run
from deploy.run_dir import RunDirectory
from learner.checkpoint import CheckpointStore
from replay import layout, synthetic

Command = Callable[..., Outcome]
Recipe = Callable[..., Path]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run of its own, with at least two checkpoints, where `recipe()` would put it."""
    target = tmp_path / "runs" / finished.name
    shutil.copytree(finished, target)
    assert len(checkpoints(target)) >= 2
    return target


def checkpoints(run: Path) -> list[Path]:
    return CheckpointStore(run / "checkpoints", keep=3).paths()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


# ---- checkpoints --------------------------------------------------------------------------------------


def test_eval_plays_with_the_newest_checkpoint(dreamfleet: Command, copied: Path) -> None:
    report = json.loads(dreamfleet("eval", copied, "--episodes", "2", "--json").out)
    assert report["updates"] == int(checkpoints(copied)[-1].name.split("-")[1])


@pytest.mark.parametrize("damage", [truncate, flip])
def test_eval_falls_back_to_the_older_checkpoint(
    dreamfleet: Command, copied: Path, damage: Callable[[Path], None]
) -> None:
    damage(checkpoints(copied)[-1] / "arrays.safetensors")
    outcome = dreamfleet("eval", copied, "--episodes", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["updates"] == int(checkpoints(copied)[-2].name.split("-")[1])
    assert "Traceback" not in outcome.err


def test_without_any_sound_checkpoint_nothing_is_played_or_trained(
    dreamfleet: Command, recipe: Recipe, copied: Path
) -> None:
    for path in checkpoints(copied):
        flip(path / "state.json")
    before = sorted(p.name for p in (copied / "checkpoints").iterdir())
    newest = checkpoints(copied)[-1].name
    says = [f"none of the {len(before)} checkpoints", f"{newest}/state.json", "restore", "move checkpoints/"]
    dreamfleet("eval", copied).check_refused(5, *says)
    dreamfleet("train", recipe(), "--backend", "local").check_refused(5, "learner-0", *says)
    assert sorted(p.name for p in (copied / "checkpoints").iterdir()) == before


def test_checkpoint_of_another_model_is_refused(dreamfleet: Command, recipe: Recipe, copied: Path) -> None:
    larger = ["--set", "learner.settings.size=size1m"]
    outcome = dreamfleet("train", recipe(), "--backend", "local", *larger)
    outcome.check_refused(
        2, "another shape", "learner.settings.size: 'nano' on disk, 'size1m' asked", "name=NEW"
    )
    # Somebody copies one in: the settings of the run agree, the checkpoint does not.
    store = CheckpointStore(copied / "checkpoints", keep=3)
    loaded = store.newest()
    assert loaded is not None
    signature = loaded.meta["signature"] | {"settings.deter": 4096}
    store.save(loaded.step, loaded.state, {**loaded.meta, "signature": signature})
    dreamfleet("eval", copied).check_refused(2, "settings.deter is 4096 in the checkpoint, must be 128")


def test_damaged_run_file_is_named(dreamfleet: Command, recipe: Recipe, copied: Path) -> None:
    truncate(copied / "run.json")
    for command in (["eval", copied], ["audit", copied], ["train", recipe(), "--backend", "local"]):
        dreamfleet(*command).check_refused(5, "run.json is unreadable", "restore it")


# ---- replay ---------------------------------------------------------------------------------------------


def test_replay_of_another_schema_is_refused(dreamfleet: Command, recipe: Recipe, tmp_path: Path) -> None:
    table = synthetic.vector_table(vector=7)
    layout.open_table(tmp_path / "runs" / "short" / "replay", table)
    outcome = dreamfleet("train", recipe(), "--backend", "local")
    outcome.check_refused(
        2, "has schema", table.digest[:12], "column image not stored", "another replay root"
    )


def test_audit_finds_a_flipped_row(dreamfleet: Command, copied: Path) -> None:
    assert dreamfleet("audit", copied).code == 0
    steps = next((copied / "replay" / "shard-0000").glob("*e0001.zarr")) / "step" / "c" / "0" / "0"
    raw = bytearray(steps.read_bytes())
    raw[4] ^= 1
    steps.write_bytes(raw)
    outcome = dreamfleet("audit", copied)
    assert outcome.code == 5
    assert "DOES NOT BALANCE" in outcome.out
    assert json.loads(dreamfleet("audit", copied, "--json").out)["balanced"] is False


# ---- environments ---------------------------------------------------------------------------------------

BREAKING = """
import gymnasium
import numpy as np


class Breaking(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, fault, at):
        self.fault, self.at, self.steps = fault, at, 0

    def obs(self):
        if self.steps < self.at:
            return np.zeros(3, np.float32)
        if self.fault == "crash":
            raise RuntimeError("simulator fell over")
        return {
            "shape": np.zeros(4, np.float32),
            "dtype": np.array(["a", "b", "c"]),
            "nan": np.full(3, np.nan, np.float32),
        }[self.fault]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.obs(), {}

    def step(self, action):
        self.steps += 1
        return self.obs(), 1.0, self.steps >= 20, False, {}


def make(fault, at=0):
    return Breaking(fault, at)
"""


@pytest.fixture
def breaking(tmp_path: Path) -> str:
    (tmp_path / "breaking_env.py").write_text(BREAKING)
    return "breaking_env:make"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("shape", ["(4,)", "must be shape (3,)"]),
        ("dtype", ["<U1", "must be dtype float32"]),
        ("nan", ["'vector' holds NaN"]),
        ("crash", ["simulator fell over"]),
    ],
)
def test_environment_that_breaks_its_word_at_once_is_refused(
    dreamfleet: Command, recipe: Recipe, breaking: str, tmp_path: Path, fault: str, says: list[str]
) -> None:
    env = {"name": breaking, "options": {"fault": fault}}
    outcome = dreamfleet("train", recipe(env=env), "--backend", "local")
    outcome.check_refused(6, breaking, *says, f"dreamfleet env check {breaking}")
    assert not (tmp_path / "runs").exists()


def test_environment_that_keeps_breaking_later_ends_the_run(
    dreamfleet: Command, recipe: Recipe, breaking: str, tmp_path: Path
) -> None:
    env = {"name": breaking, "options": {"fault": "nan", "at": 5, "max_restarts": 3}}
    outcome = dreamfleet("train", recipe(env=env, max_restarts=1), "--backend", "local")
    outcome.check_refused(6, "actor-", "broke 4 times", "holds NaN", "mend the environment")
    assert audit_run(tmp_path / "runs" / "short").balanced  # what had come before is good, whole and kept


# ---- a full disk ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 88 MiB; skips where mounting is not allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=88m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_disk_too_small_is_refused_before_anything_is_written(
    dreamfleet: Command, recipe: Recipe, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(40 << 20))
    outcome = dreamfleet("train", recipe(), "--backend", "local", "--set", f"root={small_disk}")
    outcome.check_refused(3, "48 MiB free", "64 MiB are needed", "free space")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def fill_up(ballast: Path) -> None:
    """Write until not a byte more fits."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


@pytest.mark.drill
def test_disk_that_fills_ends_the_run_which_resumes_once_there_is_space(
    small_disk: Path, tmp_path: Path
) -> None:
    recipe = SHORT | {"root": str(small_disk), "env_steps": 1_000_000}
    with Drill(tmp_path / "drill", recipe) as run:
        run.run_dir = RunDirectory(small_disk / "drill")
        run.start()
        run.wait_for("updates", lambda: run.updates > 5)
        fill_up(small_disk / "ballast")
        assert run.wait() == 3, run.tail()
        assert run.processes() == []
        shown = run.output.read_text()
        assert "Traceback" not in shown
        message = shown[shown.index("\nerror: ") :]
        assert "No space left on device" in message
        assert "free space" in message
        assert len(message.splitlines()) < SCREEN_LINES
        (small_disk / "ballast").unlink()
        audit = audit_run(run.run_dir.path)
        assert audit.balanced, audit.text()

        run.start()
        run.wait_for("rows beyond", lambda: run.inserted > audit.inserted > 0 and run.updates > 5)
        run.kill_everything()
        again = audit_run(run.run_dir.path)
        assert again.balanced, again.text()
