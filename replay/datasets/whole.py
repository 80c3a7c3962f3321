"""Directories that exist whole or not at all: written under a hidden name, renamed when complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from system.errors import ConfigError, PreflightError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that becomes `path` when the body ends well, else goes.

    What a killed process left is hidden (`.NAME.partial`), never read, and cleared by the next attempt.
    Raises: ConfigError when `path` exists or is being written; PreflightError when the disk refuses.
    """
    path = path.absolute()
    if path.exists():
        raise ConfigError(f"{path} already exists, nothing is overwritten; choose another place or remove it")
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        handle = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PreflightError(
            f"cannot write in {path.parent} ({error.strerror}); choose another place"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{path} is being written by another process; wait for it") from error
        _clear(draft)
        try:
            yield draft
            os.fsync(handle)
            draft.rename(path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise PreflightError(
                f"cannot write {path} ({error.strerror or error}); nothing was kept: free space, then "
                "try again"
            ) from error
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
