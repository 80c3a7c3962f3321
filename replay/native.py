"""The row copy of `gather.c`, compiled once per machine by its C compiler; absent where there is none.

Only speed depends on it: `replay.rows` copies the same bytes by numpy. Figures: docs/performance.md.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("gather.c")
FLAGS = ("-O3", "-shared", "-fPIC")
COMPILE_SECONDS = 60.0

Gather = Callable[[int, int, int, int, int, int, int], None]
"""columns, addresses of the target columns, of the source columns, bytes per row; at, first, count."""


@functools.cache
def load_gather() -> Gather | None:
    """The compiled copy, None when it cannot be had here. It releases the interpreter lock."""
    try:
        gather = _loaded(_cache_dir())
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError, RuntimeError) as error:
        log.info("rows are copied by numpy", extra={"cause": str(error)})
        return None
    gather.argtypes = (ctypes.c_int64, *(ctypes.c_void_p,) * 3, *(ctypes.c_int64,) * 3)
    gather.restype = None
    return gather


def _cache_dir() -> Path:
    """Raises: OSError, RuntimeError when there is no directory that belongs to this user alone."""
    base = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(base) if base else Path.home() / ".cache") / "dreamfleet"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = directory.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(f"{directory} can be written by others; code from there is not run")
    return directory


def _loaded(directory: Path) -> Any:
    """The function in the library for this source and machine, compiled when it is not in `directory` yet.

    The name of the library ends in a digest of its bytes: a damaged one is never run, and built anew.
    Raises: OSError, AttributeError, subprocess.SubprocessError, ValueError when it cannot be built.
    """
    salt = " ".join((*FLAGS, platform.machine(), *platform.libc_ver())).encode()
    stem = f"gather-{_digest(SOURCE.read_bytes() + salt)}"
    for path in directory.glob(f"{stem}-*.so"):
        try:
            if path.name == f"{stem}-{_digest(path.read_bytes())}.so":
                return ctypes.CDLL(str(path)).gather
        except (OSError, AttributeError) as error:
            log.info("compiled row copy does not load", extra={"path": str(path), "cause": str(error)})
        path.unlink(missing_ok=True)
    return _build(directory, stem)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _build(directory: Path, stem: str) -> Any:
    """Compile and load; only what can be loaded stays in `directory`. Raises: as `_loaded`."""
    compiler, *arguments = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C compiler {compiler}")
    handle, name = tempfile.mkstemp(dir=directory, suffix=".so")
    os.close(handle)
    draft = Path(name)
    try:
        subprocess.run(
            [compiler, *arguments, *FLAGS, "-o", name, str(SOURCE)],
            check=True,
            capture_output=True,
            timeout=COMPILE_SECONDS,
        )
        gather = ctypes.CDLL(name).gather
        draft.replace(directory / f"{stem}-{_digest(draft.read_bytes())}.so")
    finally:
        draft.unlink(missing_ok=True)
    return gather
