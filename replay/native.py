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
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

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
        library = ctypes.CDLL(str(_built(_cache_dir())))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        log.info("rows are copied by numpy", extra={"cause": str(error)})
        return None
    gather = library.gather
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


def _built(directory: Path) -> Path:
    """The shared library for this source and machine, compiled when it is not in `directory` yet."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    source = SOURCE.read_bytes()
    salt = " ".join((*FLAGS, platform.machine(), *platform.libc_ver()))
    path = directory / f"gather-{hashlib.sha256(source + salt.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    handle, draft = tempfile.mkstemp(dir=directory, suffix=".so")
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *FLAGS, "-o", draft, str(SOURCE)],
            check=True,
            capture_output=True,
            timeout=COMPILE_SECONDS,
        )
        handle = os.open(draft, os.O_RDONLY)
        try:
            os.fsync(handle)  # a library cut off by a power failure would be found and loaded
        finally:
            os.close(handle)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)
    return path
