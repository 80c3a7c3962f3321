"""What the driver asks of a backend: launch a role, tell how it is, stop it.

Implemented by `local.LocalFleet` (plain processes) and `ray_fleet.RayFleet` (Ray actors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from deploy.roles import RoleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStatus:
    """Newest word of one role. Made by a backend, taken by the driver."""

    state: str  # starting | running | stopped | failed
    age: float  # seconds since the role last said anything
    pid: int = 0
    address: str = ""
    metrics_port: int = 0
    payload: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: str = ""  # traceback or last log lines of a failed role
    exit_code: int = 0


class Fleet(Protocol):
    """Runs roles somewhere. Every call returns within seconds."""

    def launch(self, spec: RoleSpec) -> None: ...
    def statuses(self) -> dict[str, RoleStatus]: ...
    def stop(self, key: str, timeout: float) -> RoleStatus: ...
    def kill(self, key: str) -> None: ...
    def close(self) -> None: ...
