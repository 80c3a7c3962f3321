"""A control group that limits the memory of a bench's processes, whichever version of cgroups there is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from system.errors import PreflightError

MOUNT = Path("/sys/fs/cgroup")
REMOVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemory:
    """Bytes charged to a group now. Made by MemoryGroup.read."""

    anon: int  # heap and stacks: nothing but a process gives them back
    file: int  # page cache, mapped or not: the kernel gives it up when others need room
    mapped: int  # the part of `file` that processes have mapped
    usage: int  # all, kernel memory included
    oom_kills: int


class MemoryGroup:
    """Context: processes that call `enter` share `limit` bytes of memory, page cache included."""

    def __init__(self, limit: int) -> None:
        """Raises: PreflightError when no memory controller is writable here."""
        name = f"dreamfleet-bench-{os.getpid()}"
        tried: list[str] = []
        for parent, version in _parents():
            path = parent / name
            try:
                self._make(path, version, limit)
            except OSError as error:
                tried.append(f"{path}: {error.strerror}")
                if path.exists():
                    path.rmdir()
                continue
            self.path, self.version = path, version
            return
        raise PreflightError(
            f"no memory limit can be set here ({'; '.join(tried) or 'no cgroup mounted'}); run as root with "
            f"a writable memory controller under {MOUNT}, in docker with --privileged"
        )

    @staticmethod
    def _make(path: Path, version: int, limit: int) -> None:
        if version == 2 and "memory" not in (path.parent / "cgroup.subtree_control").read_text().split():
            (path.parent / "cgroup.subtree_control").write_text("+memory")
        path.mkdir()
        if version == 1:
            (path / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (path / "memory.max").write_text(str(limit))
            swap = path / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")

    def enter(self) -> None:
        """Move the calling process into the group; what it starts is in it too."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def read(self) -> GroupMemory:
        stat = _words(self.path / "memory.stat")
        if self.version == 1:
            return GroupMemory(
                anon=stat["total_rss"],
                file=stat["total_cache"],
                mapped=stat["total_mapped_file"],
                usage=int((self.path / "memory.usage_in_bytes").read_text()),
                oom_kills=_words(self.path / "memory.oom_control").get("oom_kill", 0),
            )
        return GroupMemory(
            anon=stat["anon"],
            file=stat["file"],
            mapped=stat["file_mapped"],
            usage=int((self.path / "memory.current").read_text()),
            oom_kills=_words(self.path / "memory.events")["oom_kill"],
        )

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the group once its processes have ended."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return


def _words(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


def _parents() -> Iterator[tuple[Path, int]]:
    """Groups under which one could be made, and the version of their hierarchy."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield MOUNT / "memory" / own.lstrip("/"), 1
            yield MOUNT / "memory", 1
        elif not controllers and (MOUNT / "cgroup.controllers").exists():
            # A group with processes of its own may not hand controllers down: go beside it, or to the root.
            yield (MOUNT / own.lstrip("/")).parent if own != "/" else MOUNT, 2
            yield MOUNT, 2
