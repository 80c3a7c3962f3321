"""What `Dreamfleet.save_to_path` leaves and what restoring makes of it; no Ray in here.

A saved directory is self-contained as far as the policy goes: `run/` holds the configuration, the
environment spec and the newest checkpoint, and can be evaluated like any run directory. Replay is held by
reference: it may be a thousand times larger and its newest segments are still being written, so it stays
where it is and `dreamfleet.json` names that run directory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory, read_json
from learner.checkpoint import MANIFEST, CheckpointStore
from system.errors import ConfigError, IntegrityError, PreflightError

log = logging.getLogger(__name__)
FORMAT = 1
INDEX = "dreamfleet.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Contents of dreamfleet.json. Made by save, taken by Dreamfleet.from_checkpoint and restore."""

    format: int
    source: str  # run directory that was saved; its replay/ is the replay of this checkpoint
    training_iteration: int
    settings: Mapping[str, Any]  # the whole resolved RunConfig
    origin: Mapping[str, str]  # where each of them came from


def save(path: Path, run_dir: RunDirectory, saved: Saved) -> None:
    """Copy what the policy needs from `run_dir` into `path`; the index is written last.

    Raises: ConfigError when the run has no checkpoint yet, PreflightError when `path` cannot be written.
    """
    newest = _newest(run_dir)
    if newest is None:
        raise ConfigError(f"{run_dir.path} has no checkpoint that verifies; train longer before saving")
    target = RunDirectory(path / "run")
    try:
        shutil.rmtree(target.path, ignore_errors=True)
        target.checkpoints.mkdir(parents=True)
        shutil.copytree(newest, target.checkpoints / newest.name)
        for file in (run_dir.config_file, run_dir.env_file):
            shutil.copy2(file, target.path)
        target.write_json(path / INDEX, asdict(saved))
    except OSError as error:
        raise PreflightError(
            f"cannot save to {path} ({error.strerror}); free space or choose a writable place"
        ) from error


def load_index(path: Path) -> Saved:
    """Raises: ConfigError when `path` was not made by `save`, IntegrityError when its index is broken."""
    file = path / INDEX
    if not file.is_file():
        raise ConfigError(f"{path} holds no {INDEX}; give a directory written by Dreamfleet.save_to_path")
    try:
        saved = Saved(**read_json(file))
        RunConfig.model_validate(saved.settings)
    except (TypeError, ValueError) as error:
        raise IntegrityError(f"{file} cannot be used ({error}); take another checkpoint") from error
    if saved.format != FORMAT:
        raise IntegrityError(
            f"{file} has format {saved.format}, must be {FORMAT}; use the version that made it"
        )
    return saved


def adopt(path: Path, run_dir: RunDirectory, config: RunConfig) -> bool:
    """Make the checkpoint in `path` the newest of `run_dir`, so that launching resumes from it.

    A new run directory also gets a copy of the replay it was saved with, when that still exists and nobody
    is writing to it; else it begins with a prefill. An existing one keeps its own replay, rows newer than the
    checkpoint included. Returns False, having changed nothing, when another process drives `run_dir`.
    """
    saved = load_index(path)
    try:
        run_dir.create()
    except ConfigError:
        return False
    try:
        source = RunDirectory(path / "run")
        if not run_dir.exists:
            _copy_replay(RunDirectory(Path(saved.source)), run_dir)
            shutil.copy2(source.env_file, run_dir.path)
            run_dir.write_json(run_dir.config_file, config.model_dump(mode="json"))
        _put_on_top(source, run_dir)
        run_dir.event("checkpoint restored", path=str(path), source=saved.source)
    finally:
        run_dir.release()
    return True


def _newest(run_dir: RunDirectory) -> Path | None:
    loaded = CheckpointStore(run_dir.checkpoints, keep=1).newest()
    return None if loaded is None else loaded.path


def _put_on_top(source: RunDirectory, run_dir: RunDirectory) -> None:
    store = CheckpointStore(source.checkpoints, keep=1)
    loaded = store.newest()
    if loaded is None:
        raise IntegrityError(f"no checkpoint in {source.path} verifies; take another one")
    present = CheckpointStore(run_dir.checkpoints, keep=1).paths()
    same = present and (present[-1] / MANIFEST).read_bytes() == (loaded.path / MANIFEST).read_bytes()
    if same:
        return
    serial = int(present[-1].name.split("-")[0]) + 1 if present else 1
    temporary = run_dir.checkpoints / f".saving-adopted-{serial}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(loaded.path, temporary)
    temporary.rename(run_dir.checkpoints / f"{serial:06d}-{loaded.step}")


def _copy_replay(source: RunDirectory, run_dir: RunDirectory) -> None:
    if not source.replay.is_dir():
        log.warning("replay not found, training begins with a prefill", extra={"source": str(source.path)})
        return
    try:
        source.create()  # its lock: a segment must not grow while it is copied
    except (ConfigError, PreflightError):
        log.warning("replay is in use, training begins with a prefill", extra={"source": str(source.path)})
        return
    try:
        temporary = run_dir.path / ".replay-copy"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source.replay, temporary)
        shutil.rmtree(run_dir.replay)
        temporary.rename(run_dir.replay)
        # Shards know rows by actor and incarnation: one that began again at 1 would look like an echo.
        shutil.copy2(source.incarnations_file, run_dir.path)
    finally:
        source.release()
