"""Runs other projects' DreamerV3 learners under our load: TorchRL in the peers' environment, RLlib here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.load import Load, Row
from bench.peer_environment import peer_output, peer_python

PEERS: dict[str, Callable[[], Path | str]] = {
    "torchrl_dreamer": peer_python,
    "rllib_dreamer": lambda: sys.executable,
}
"""Module of `bench.peers` -> the interpreter it needs."""


def peer_rows(case: str, threads: int, seconds: float, ours: float) -> Iterator[Row]:
    """update_ms (ratio: how many of our updates, `ours` milliseconds each, fit in), cpu_per_wall and params.

    Raises: InfrastructureError when an environment cannot be made or a peer fails.
    """
    for peer, python in PEERS.items():
        if peer == "rllib_dreamer" and find_spec("ray") is None:
            print("bench: RLlib is not measured, ray is not installed here", file=sys.stderr)
            continue
        command = [str(python()), "-m", f"bench.peers.{peer}", "--case", case]
        with Load() as load:
            found = peer_output([*command, "--threads", str(threads), "--seconds", str(seconds)])
        for line in found.splitlines():
            if line.startswith("{"):
                row = Row(**json.loads(line), foreign_load=load.foreign)
                if row.metric == "update_ms":
                    row = Row(**(row.to_json() | {"ratio": row.value / ours, "ratio_to": "dreamfleet"}))
                yield row
