"""Checkpoints on disk: directories that are either whole and verified, or not there.

`<root>/<serial>-<step>/` holds arrays.safetensors, state.json and manifest.json (size and sha256 of
both, and a digest over itself). A save is written under a temporary name, flushed to the disk and
renamed; it never touches earlier ones. Between `learner.loop`, which takes the cut, and the run directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.state_files import MAX_JSON_BYTES, read_state, write_arrays, write_json
from learner.state_tree import split_state
from system.errors import ConfigError, IntegrityError, PreflightError

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"(\d{6,12})-(\d{1,18})")  # serial-step; the greatest serial is the newest save
ARRAYS, STATE, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
TEMPORARY = ".saving-"
SPARE_BYTES = 8 << 20
"""Free space a save leaves over: logs, events and the next manifest must still fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A verified checkpoint. Made by CheckpointStore, taken by `learner.loop.resume` and the command line."""

    path: Path
    step: int
    state: dict[str, Any]
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run; `keep` newest are kept. One process saves, any may load."""

    def __init__(self, root: Path, keep: int) -> None:
        """Raises: ConfigError for keep < 1, PreflightError when `root` cannot be made."""
        if keep < 1:
            raise ConfigError(f"checkpoint keep ({keep}) must be >= 1; raise it")
        self.root, self._keep = root, keep
        with _disk_trouble(root):
            root.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Write nested dicts of numpy arrays and JSON values; return the new checkpoint's path.

        Raises: PreflightError when the disk is full or not writable (nothing is left half-written,
        earlier checkpoints stay), ConfigError for a value that cannot be stored.
        """
        assert step >= 0, step
        tree, arrays = split_state(state)
        needed = sum(array.nbytes for array in arrays.values()) + SPARE_BYTES
        with _disk_trouble(self.root):
            self._remove_abandoned()
            if (free := shutil.disk_usage(self.root).free) < needed:
                raise OSError(errno.ENOSPC, f"{free} bytes are free and {needed} are needed")
            temporary = self.root / f"{TEMPORARY}{os.getpid()}-{time.monotonic_ns()}"
            temporary.mkdir()
            try:
                files = {
                    ARRAYS: write_arrays(temporary / ARRAYS, arrays),
                    STATE: write_json(temporary / STATE, tree),
                }
                write_json(temporary / MANIFEST, _manifest(step, meta, files))
                _sync_directory(temporary)
                path = self.root / self.next_name(step)
                temporary.rename(path)
                _sync_directory(self.root)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            self._prune()
        log.info("checkpoint saved", extra={"path": str(path), "step": step})
        return path

    def next_name(self, step: int) -> str:
        """What the next save of `step` will be called."""
        return f"{self._next_serial():06d}-{step}"

    def newest(self) -> Loaded | None:
        """The newest checkpoint that verifies, or None. Broken ones are logged and left in place."""
        for path in reversed(self.paths()):
            try:
                return self.load(path)
            except IntegrityError as error:
                log.warning("checkpoint skipped", extra={"path": str(path), "why": str(error)})
        return None

    def newest_sound(self) -> Loaded | None:
        """As `newest`, None only where nothing was ever saved.

        Raises: IntegrityError when there are checkpoints and none verifies: to go on without would silently
        train from scratch.
        """
        loaded = self.newest()
        if loaded is None and (present := self.paths()):
            try:
                self.load(present[-1])
            except IntegrityError as error:
                raise IntegrityError(
                    f"none of the {len(present)} checkpoints in {self.root} verifies, the newest because: "
                    f"{error}. To train from scratch on the replay there is, move {self.root.name}/ away"
                ) from error
        return loaded

    def newest_meta(self) -> tuple[str, dict[str, Any]] | None:
        """Name and meta of the checkpoint that `newest` would load, without its arrays."""
        for path in reversed(self.paths()):
            try:
                return path.name, _verified(path)["meta"]
            except IntegrityError:
                continue  # the learner says so when it loads
        return None

    def load(self, path: Path) -> Loaded:
        """Verify and read one checkpoint. Raises: IntegrityError naming the file and the remedy."""
        manifest = _verified(path)
        return Loaded(
            path=path,
            step=manifest["step"],
            state=read_state(path / STATE, path / ARRAYS),
            meta=manifest["meta"],
        )

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first, broken ones too; what has another name is not ours."""
        if not self.root.is_dir():
            return []
        named = [
            (p, NAME.fullmatch(p.name)) for p in self.root.iterdir() if p.is_dir() and not p.is_symlink()
        ]
        return [p for _, p in sorted((int(m[1]), p) for p, m in named if m)]

    def _next_serial(self) -> int:
        paths = self.paths()
        return int(paths[-1].name.split("-")[0]) + 1 if paths else 1

    def _prune(self) -> None:
        for path in self.paths()[: -self._keep]:
            condemned = path.with_name(
                f"{TEMPORARY}{path.name}"
            )  # a kill meanwhile must not leave half of one
            path.rename(condemned)
            shutil.rmtree(condemned, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        for path in self.root.glob(f"{TEMPORARY}*"):
            log.warning("abandoned save removed", extra={"path": str(path)})
            shutil.rmtree(path, ignore_errors=True)


def check_signature(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was made for with what it is loaded into; nested mappings allowed.

    Raises: ConfigError naming every entry that differs.
    """
    differences = list(_differences(expected, found, ""))
    if differences:
        listed = "; ".join(differences[:8])
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ConfigError(
            f"this checkpoint belongs to another model or environment: {listed}{more}; resume with the "
            "settings it was made with, or start a new run"
        )


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str) -> Iterator[str]:
    absent = object()
    for key in sorted({*expected, *found}):
        ours, theirs = expected.get(key, absent), found.get(key, absent)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{prefix}{key}.")
        elif _plain(ours) != _plain(theirs):
            here = "absent" if ours is absent else repr(ours)
            there = "absent" if theirs is absent else repr(theirs)
            yield f"{prefix}{key} is {there:.60} in the checkpoint, must be {here:.60}"


def _plain(value: Any) -> Any:
    """A value as JSON would bring it back: tuples are lists."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _manifest(step: int, meta: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    body = {
        "format": FORMAT,
        "step": step,
        "meta": dict(meta),
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()},
    }
    return {**body, "digest": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if not file.is_file() or file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it must be a file of at most {MAX_JSON_BYTES} bytes")
        manifest = json.loads(file.read_bytes())
        digest = manifest.pop("digest")
        if digest != _digest(manifest):
            raise ValueError("its digest is wrong")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, must be {FORMAT}")
        # Exact names: nothing in a manifest can point outside its own directory.
        if set(manifest["files"]) != {ARRAYS, STATE}:
            raise ValueError(f"it lists {sorted(manifest['files'])!r:.100}, must list {[ARRAYS, STATE]}")
        sizes = [manifest["step"], *(about["size"] for about in manifest["files"].values())]
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError("step and sizes must be integers >= 0")
        if not all(isinstance(about["sha256"], str) for about in manifest["files"].values()):
            raise ValueError("digests must be text")
        if not isinstance(manifest["meta"], dict):
            raise ValueError("meta must be an object")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _broken(file, f"cannot be used ({error})") from error
    return manifest


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says. Raises: IntegrityError."""
    manifest = _read_manifest(path)
    for name, about in manifest["files"].items():
        _verify(path / name, about["size"], about["sha256"])
    return manifest


def _verify(file: Path, size: int, digest: str) -> None:
    try:
        actual = file.stat().st_size
        if actual != size or not file.is_file():
            raise _broken(file, f"has {actual} bytes, must have {size}")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _broken(file, f"cannot be read ({error.strerror})") from error
    if found != digest:
        raise _broken(file, f"has sha256 {found[:12]}, must have {digest[:12]}")


def _broken(file: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"checkpoint file {file} {why}; resume from an older checkpoint or restore this one from a copy"
    )


@contextmanager
def _disk_trouble(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"cannot write checkpoints to {root} ({error.strerror}); free space there, mend its permissions "
            "or choose another run directory; earlier checkpoints are untouched"
        ) from error


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
