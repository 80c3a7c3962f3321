"""`dreamfleet doctor`: is this machine ready? Each check names what it found and the remedy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from system.errors import DreamfleetError

NEEDED = ("torch", "numpy", "gymnasium", "zarr", "grpcio", "pydantic", "safetensors", "prometheus-client")
OPTIONAL = {"ray": "backend ray and Tune", "envpool": "envpool: environments"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding: ok, warn (works, but) or fail (train would refuse)."""

    name: str
    level: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings."""

    checks: list[Check]

    @property
    def ready(self) -> bool:
        return all(check.level != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"ready": self.ready, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        lines = [
            f"{c.level:5} {c.name:14} {c.found}" + (f"\n{'':21}-> {c.remedy}" if c.remedy else "")
            for c in self.checks
        ]
        return "\n".join([*lines, "ready" if self.ready else "not ready"])


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    return Check(
        name="python", level="ok" if ok else "fail", found=version, remedy="" if ok else "use Python >= 3.11"
    )


def _packages() -> Iterator[Check]:
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield Check(name=name, level="ok", found=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                yield Check(
                    name=name, level="warn", found="absent", remedy=f"pip install {name} for {OPTIONAL[name]}"
                )
            else:
                yield Check(name=name, level="fail", found="absent", remedy=f"pip install {name}")


def _device() -> Check:
    from learner.devices import resolve_device

    device = str(resolve_device("auto"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    level = "ok" if device != "cpu" else "warn"
    remedy = "" if level == "ok" else "no GPU: use small models (settings.size nano) or a CUDA machine"
    return Check(name="device", level=level, found=f"auto takes {device}, {cores} CPU cores", remedy=remedy)


def _loopback() -> Check:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        return Check(name="loopback", level="ok", found=f"can listen (took port {server.getsockname()[1]})")


def _disk(root: Path) -> Check:
    place = root.absolute()
    while not place.exists():
        place = place.parent
    with tempfile.NamedTemporaryFile(dir=place) as file:
        block, began = os.urandom(1 << 20), time.perf_counter()
        for _ in range(32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = 32 / (time.perf_counter() - began)
    free = shutil.disk_usage(place).free / 2**30
    level = "ok" if free > 2 else "warn"
    return Check(
        name="disk", level=level, found=f"{place}: {free:.1f} GiB free, {speed:.0f} MiB/s written and synced",
        remedy="" if level == "ok" else "replay and checkpoints need space; choose another root",
    )  # fmt: skip


def _environment() -> Check:
    from deploy.probe import probe_env

    names = ["gym:CartPole-v1"]
    try:
        importlib.metadata.version("envpool")
        names.append("envpool:CartPole-v1")
    except importlib.metadata.PackageNotFoundError:
        pass
    for name in names:
        probe_env(name, {})
    return Check(name="environment", level="ok", found=f"{', '.join(names)} gave a first observation")


def examine(root: Path) -> Report:
    """Run every check; one that raises becomes a failed check with its message."""
    checks = [_python(), *_packages()]
    steps: dict[str, Callable[[], Check]] = {
        "device": _device, "loopback": _loopback, "disk": lambda: _disk(root), "environment": _environment,
    }  # fmt: skip
    for name, step in steps.items():
        try:
            checks.append(step())
        except (DreamfleetError, OSError) as error:
            checks.append(
                Check(name=name, level="fail", found=str(error), remedy="mend the cause named here")
            )
    return Report(checks=checks)
