"""The driver's view of the learner's ranks: launched together, judged as one, and relaunched together.

Rank 0 is `learner-0` and runs the learn loop; the others are `learner-1` and so on. No rank can go on without
the others, so the end of one is the end of all. Between `deploy.driver` and `deploy.learner_ranks`.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from deploy.fleet import RoleStatus

LOOPBACK = "127.0.0.1"
"""Ranks are on the driver's node, beside the replay: what they say to each other is not encrypted."""
BETRAYED = 6
"""Exit code of a rank that ended because another one was lost."""
LEAST_SILENCE_SECONDS = 5.0
"""A rank 0 that has been silent for longer saves nothing any more, or too much."""
LONGEST_SECONDS = 30.0


def rank_keys(ranks: int) -> list[str]:
    """Keys of all ranks of a learner, rank 0 first."""
    return [f"learner-{rank}" for rank in range(ranks)]


def meeting_place(ranks: int) -> dict[str, Any]:
    """What the specs of one life of the group have in common. A single rank meets nobody.

    The port is free now. Whoever takes it meanwhile makes rank 0 fail, and the group is launched anew.
    """
    if ranks == 1:
        return {"driver": os.getpid()}
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    return {
        "ranks": ranks,
        "host": LOOPBACK,
        "port": port,
        "secret": secrets.token_hex(16),
        "driver": os.getpid(),
    }


def awaited(launch: str, ranks: int, rank_zero: RoleStatus | None, run_dir: Path) -> str:
    """The command that somebody has to start before the ranks are there; empty when they are."""
    if launch != "torchrun" or rank_zero is None or rank_zero.pid:
        return ""
    return f"torchrun --nproc-per-node {ranks} --max-restarts 20 -m deploy.torchrun {run_dir}"


def end_of(status: RoleStatus, silent_seconds: float) -> str:
    """Why a role that should work does not; empty when it does."""
    if status.state == "failed":
        return status.error or "no message"
    if status.state == "stopped":
        return "stopped by somebody else"
    return f"silent for {status.age:.0f} s" if status.age > silent_seconds else ""


def culprit(broken: Mapping[str, RoleStatus], fatal: Collection[int]) -> str:
    """Which of the broken ranks tells why: one that no restart heals, one that died by itself, one that is
    silent; the others only lost a peer.
    """

    def order(key: str) -> tuple[int, str]:
        status = broken[key]
        if status.state != "failed":
            return 2, key
        return (0 if status.exit_code in fatal else 3 if status.exit_code == BETRAYED else 1), key

    return min(broken, key=order)


class Mourning:
    """Gives rank 0 the time to find out that another rank is lost, and to save what it has."""

    def __init__(self, silence: float) -> None:
        self._silence = max(LEAST_SILENCE_SECONDS, silence)
        self._since: float | None = None

    def goes_on(self, rank_zero: RoleStatus, now: float) -> bool:
        """Whether to wait longer; to be asked again and again from the loss on, until it is False."""
        if self._since is None:
            self._since = now
        saving = rank_zero.state == "running" and rank_zero.age <= self._silence
        if saving and now - self._since < LONGEST_SECONDS:
            return True
        self._since = None
        return False
