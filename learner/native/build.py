"""Compiles the C++ sources beside it once per machine, and loads the library.

One call of the compiler, no torch headers: the functions take plain memory. The library is kept in a
directory of this user alone, under a name that tells sources, flags, processor, compiler and the digest of
its own bytes. Processes that want it at the same time wait, with a deadline, for the one that builds it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SOURCES = Path(__file__).parent
# No -ffast-math: it drops what is not a number, and may set flush-to-zero for the whole process.
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-shared"),
)
CPU_LINES = ("vendor_id", "cpu family", "model\t", "stepping", "flags", "Features", "CPU part")
COMPILE_SECONDS = 60.0
WAIT_SECONDS = 75.0  # for others and for the compiler together: a role has 120 s to start
POLL_SECONDS = 0.1


def load_library() -> ctypes.CDLL:
    """The library for these sources and this processor, compiled when there is none yet.

    Raises: OSError, ValueError, subprocess.SubprocessError when it cannot be had here.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    directory = cache_directory()
    compiler = find_compiler()
    stem = f"regions-{_digest(*_source_bytes(), ' '.join((*FLAGS, processor())).encode())}"
    # Without a compiler what any compiler built from these sources will do.
    exact = f"{stem}-{_digest(version(compiler).encode())}" if compiler else stem
    if (library := _newest(directory, exact)) is not None:
        return library
    if compiler is None:
        raise FileNotFoundError("no C++ compiler; install g++ or name one in CXX")
    with _locked(directory / f"{stem}.lock", deadline):
        return _newest(directory, exact) or _build(directory, exact, compiler, deadline)


def cache_directory() -> Path:
    """Raises: OSError when there is no directory that belongs to this user alone."""
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111, never raises
    own, shared = home / "dreamfleet", Path(tempfile.gettempdir()) / f"dreamfleet-{os.getuid()}"
    causes = []
    for directory in [own, shared] if home.is_absolute() else [shared]:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # In a directory of everybody's a link is its maker's, who can turn it elsewhere after this look.
            about = directory.stat(follow_symlinks=directory is own)
            if about.st_uid != os.getuid() or about.st_mode & 0o022:
                raise OSError(f"{directory} can be written by others; code from there is not run")
            if not os.access(directory, os.W_OK | os.X_OK):
                raise OSError(f"{directory} is read-only")
            return directory
        except OSError as error:
            causes.append(str(error))
    raise OSError("; ".join(causes))


def find_compiler() -> tuple[str, ...] | None:
    """The command in CXX, else g++ or c++. Raises: ValueError when CXX is no command line."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"]]:
        if shutil.which(command[0]) is not None:
            return tuple(command)
    return None


def version(compiler: tuple[str, ...]) -> str:
    """What the compiler says about itself. Raises: OSError, subprocess.SubprocessError."""
    return " ".join(compiler) + _output([*compiler, "--version"], COMPILE_SECONDS)


def _output(command: list[str], seconds: float) -> str:
    """What a command prints. Raises: OSError, subprocess.SubprocessError.

    A compiler is a family of processes: when it takes too long all of them end, not the first alone.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, complaints = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, complaints)
    return out


def processor() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = {line for line in text.splitlines() if line.startswith(CPU_LINES)}
    return " ".join((platform.machine(), *platform.libc_ver(), *sorted(lines)))


def _source_bytes() -> list[bytes]:
    paths = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    return [part for p in paths for part in (p.name.encode(), p.read_bytes())]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _newest(directory: Path, stem: str) -> ctypes.CDLL | None:
    """The newest sound library whose name begins with `stem`; damaged ones are removed, never run."""
    found = sorted(directory.glob(f"{stem}-*.so"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        if path.stem.rpartition("-")[2] == _digest(path.read_bytes()):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return None


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """One builder at a time; a holder that dies lets go. Raises: TimeoutError (an OSError)."""
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process builds since {WAIT_SECONDS:.0f} s") from None
                time.sleep(POLL_SECONDS)
            except OSError:  # a file system without locks: several may build, each a library of its own
                break
        yield


def _build(directory: Path, stem: str, compiler: tuple[str, ...], deadline: float) -> ctypes.CDLL:
    """Compile and load; only what can be loaded stays. Raises: OSError, subprocess.SubprocessError."""
    handle, name = tempfile.mkstemp(dir=directory, suffix=".draft")
    os.close(handle)
    draft = Path(name)
    sources = sorted(str(p) for p in SOURCES.glob("*.cpp"))
    try:
        seconds = min(COMPILE_SECONDS, deadline - time.monotonic())
        _output([*compiler, *FLAGS, "-o", name, *sources], seconds)
        loaded = ctypes.CDLL(name)  # raises when the compiler left no library
        draft.replace(directory / f"{stem}-{_digest(draft.read_bytes())}.so")
    finally:
        draft.unlink(missing_ok=True)
    return loaded
