"""What cannot work is refused before anything starts: value, rule, remedy, exit code, nothing left behind."""

import fcntl
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.drill import Outcome

Command = Callable[..., Outcome]
Recipe = Callable[..., Path]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("env.name=Foo", ["'Foo'", "must be written envpool:<Task>", "gym:Foo"]),
        ("env.name=gym:CartPoel-v1", ["CartPoel-v1", "CartPole"]),
        ("env.name=toy:nope", ["toy:nope", "toy:counter"]),
        ("env.name=no_such_module_x:make", ["no_such_module_x", "cannot be imported", "<module>:<callable>"]),
        ("env.options.image_syde=4", ["image_syde", "refuses its options"]),
        ("replay.trainratio=4", ["replay.trainratio", "from --set", "replay.train_ratio"]),
        ("env_steps=many", ["env_steps", "'many'", "integer"]),
        ("replay.tolerance=1", ["tolerance_rows (1)", "2 * tolerance_rows - 1", "5 or more"]),
        ("replay.train_ratio=-1", ["replay.train_ratio", "-1", "greater than 0"]),
        ("replay.prefill=200000", ["replay.prefill (200000)", "replay.capacity (100000)", "lower"]),
        ("learner.length=60000", ["60001", "replay.capacity / streams", "lower learner.length"]),
        ("replay.segment_rows=100", ["segment_rows (100)", "multiple of 64", "50000"]),
        ("learner.family=dremer", ["'dremer'", "'dreamer'"]),
        ("learner.settings.sise=nano", ["dreamer.sise", "'size'"]),
        ("name=../elsewhere", ["../elsewhere", "letters, digits"]),
        ("nonsense", ["'nonsense'", "section.key=value"]),
    ],
)
def test_settings_that_cannot_work_are_refused(
    dreamfleet: Command, recipe: Recipe, tmp_path: Path, assignment: str, says: list[str]
) -> None:
    outcome = dreamfleet("train", recipe(env_steps=10**6), "--backend", "local", "--set", assignment)
    outcome.check_refused(2, *says)
    assert not (tmp_path / "runs").exists()


def test_batch_longer_than_a_shard_keeps_is_refused(
    dreamfleet: Command, recipe: Recipe, tmp_path: Path
) -> None:
    # Fits the whole capacity, but not what one shard is sure to hold while it evicts a segment.
    sizes = ["--set", "replay.capacity=4096", "--set", "replay.segment_rows=1024"]
    outcome = dreamfleet(
        "train", recipe(env_steps=20_000), "--backend", "local", *sizes,
        "--set", "learner.length=3500", "--set", "actors.count=1", "--set", "actors.envs=1",
    )  # fmt: skip
    rule = "capacity_rows - segment_rows of each shard (4096 - 1024 = 3072)"
    outcome.check_refused(2, "3501", rule, "raise the replay capacity")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "cartpoel"], ["unknown recipe 'cartpoel'", "'cartpole'"]),
        (["train", "nowhere.yaml"], ["'nowhere.yaml' does not exist"]),
        (["eval", "nowhere"], ["nowhere is not a run directory", "path printed by train"]),
        (["status", "nowhere"], ["nowhere is not a run directory"]),
        (["audit", "nowhere"], ["nowhere is not a run directory"]),
        (["video", "nowhere"], ["nowhere is not a run directory"]),
    ],
)
def test_names_that_lead_nowhere_are_refused(
    dreamfleet: Command, tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    dreamfleet(*arguments).check_refused(2, *says)
    assert list(tmp_path.iterdir()) == []


def test_unknown_verb_and_option_are_usage_errors(dreamfleet: Command) -> None:
    for arguments in (["trian", "cartpole"], ["train", "cartpole", "--bakcend", "local"], ["train"]):
        outcome = dreamfleet(*arguments)
        assert outcome.code == 2
        assert "Usage: " in outcome.err
        assert "Traceback" not in outcome.err


def test_absent_device_is_refused_and_never_replaced(
    dreamfleet: Command, recipe: Recipe, tmp_path: Path
) -> None:
    outcome = dreamfleet("train", recipe(), "--backend", "local", "--set", "learner.device=cuda:63")
    outcome.check_refused(3, "'cuda:63'", "CUDA devices", "auto or cpu")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("setting", ["services.params_port", "services.metrics_port"])
def test_taken_port_is_refused(
    dreamfleet: Command, recipe: Recipe, tmp_path: Path, taken_port: int, setting: str
) -> None:
    outcome = dreamfleet("train", recipe(), "--backend", "local", "--set", f"{setting}={taken_port}")
    outcome.check_refused(3, f"{setting} ({taken_port})", "already in use", "choose a free port, or 0")
    assert not (tmp_path / "runs").exists()


def test_place_that_cannot_be_written_is_refused(dreamfleet: Command, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "runs"
    outcome = dreamfleet("train", recipe(), "--backend", "local", "--set", f"root={root}")
    outcome.check_refused(3, str(root), "Not a directory", "choose a writable place")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system mounted read-only; skips where mounting is not allowed."""
    place = tmp_path / "read_only"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=80m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_read_only_place_is_refused(dreamfleet: Command, recipe: Recipe, read_only: Path) -> None:
    outcome = dreamfleet("train", recipe(), "--backend", "local", "--set", f"root={read_only}")
    outcome.check_refused(3, str(read_only), "Read-only file system", "choose a writable place")


def test_run_that_somebody_drives_is_refused(dreamfleet: Command, recipe: Recipe, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "short"
    directory.mkdir(parents=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = dreamfleet("train", recipe(), "--backend", "local")
        outcome.check_refused(2, str(directory), "driven by another process", "--set name=")
    assert not (directory / "run.json").exists()
