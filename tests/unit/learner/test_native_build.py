"""The library is built once per user and machine, by one process, and only what is sound is loaded."""

import errno
import fcntl
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.native import build, library

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and sources that compile in no time."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dreamfleet"


@pytest.fixture
def forgetful() -> Iterator[None]:
    """`available` forgets what it found, before and after."""
    library._found.cache_clear()
    yield
    library._found.cache_clear()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def test_a_library_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.load_library().answer() == 42
    (path,) = libraries(cache)
    monkeypatch.setattr(build, "_build", None)  # what is sound is not built again
    assert build.load_library().answer() == 42
    assert libraries(cache) == [path]


def test_other_sources_make_another_library(cache: Path) -> None:
    build.load_library()
    (build.SOURCES / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert build.load_library().answer() == 43
    assert len(libraries(cache)) == 2


def test_another_processor_makes_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library()
    monkeypatch.setattr(build, "processor", lambda: "one with other instructions")
    build.load_library()
    assert len(libraries(cache)) == 2


def test_what_was_built_is_used_where_there_is_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.load_library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.load_library().answer() == 42


@pytest.mark.parametrize("damage", [b"", b"garbage"])
def test_a_damaged_library_is_built_anew(damage: bytes, cache: Path) -> None:
    build.load_library()
    (path,) = libraries(cache)
    sound = path.read_bytes()
    path.unlink()  # it is mapped: other bytes need another file
    path.write_bytes(damage)
    assert build.load_library().answer() == 42
    assert [p.read_bytes() for p in libraries(cache)] == [sound]


def test_a_directory_that_others_can_write_is_not_trusted(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(cache.parent / "elsewhere"))
    assert build.cache_directory() == cache.parent / "elsewhere" / f"dreamfleet-{os.getuid()}"


def test_a_link_of_another_user_in_the_temporary_directory_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / f"dreamfleet-{os.getuid()}").symlink_to(target)
    monkeypatch.setenv("XDG_CACHE_HOME", "not absolute")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(OSError, match="by others"):
        build.cache_directory()
    (tmp_path / "dreamfleet").symlink_to(target)  # where nobody else can write, links are fine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_directory() == tmp_path / "dreamfleet"


def test_without_any_directory_there_is_no_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(cache.parent / "file"))
    with pytest.raises(OSError, match="file"):
        build.load_library()


# "true" succeeds and makes no library.
@pytest.mark.parametrize("compiler", ["false", "true", "'unbalanced", "no-such-compiler"])
def test_a_compiler_that_fails_is_said_once_and_leaves_nothing(
    compiler: str,
    cache: Path,
    forgetful: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level("INFO"):
        assert not library.available()
        assert not library.available()
    assert [record.message for record in caplog.records] == ["learner runs without compiled regions"]
    assert library.absence()
    assert [p.suffix for p in cache.iterdir() if p.suffix != ".lock"] == []


def test_who_waits_for_a_builder_has_a_deadline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library()
    (lock,) = cache.glob("*.lock")
    for path in libraries(cache):
        path.unlink()
    with lock.open() as holder, monkeypatch.context() as impatient:
        impatient.setattr(build, "WAIT_SECONDS", 0.0)
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process"):
            build.load_library()
    assert build.load_library().answer() == 42  # a holder that ends lets go


def test_a_file_system_without_locks_still_gets_a_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: object, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(build.fcntl, "flock", refuse)
    assert build.load_library().answer() == 42


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A compiler whose child does not end by itself; the child holds the other end of this pipe."""
    pipe, script = tmp_path / "pipe", tmp_path / "endless"
    os.mkfifo(pipe)
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\nsleep 60 > {pipe} &\nwait\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    yield end
    os.close(end)


def test_a_compiler_that_does_not_end_is_ended_with_its_children(
    cache: Path, endless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "COMPILE_SECONDS", 1.5)
    with pytest.raises(subprocess.TimeoutExpired):
        build.load_library()
    assert select.select([endless], [], [], 20)[0], "the child lives"
    assert os.read(endless, 1) == b""
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_waiting_for_others_and_compiling_share_one_deadline(
    cache: Path, endless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "WAIT_SECONDS", 0.5)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        build.load_library()
    assert caught.value.timeout <= 0.5


def test_processes_that_start_together_build_one_library(cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from learner.native import build; "
        "build.SOURCES = Path(sys.argv[1]); assert build.load_library().answer() == 42"
    )
    command = [sys.executable, "-c", code, str(build.SOURCES)]
    started = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert len(libraries(cache)) == 1
