"""Runs other projects' replay buffers under our load, in the peers' environment."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bench.load import Load, Row
from bench.peer_environment import peer_output, peer_python

PEERS = ("memmap_gather", "torchrl_slices", "reverb_table")


def peer_rows(gigabytes: float, seconds: float) -> Iterator[Row]:
    """append_rate, memcpy_rate and sample_rate (ratio to memcpy in the peer's own process) of every peer.

    Raises: InfrastructureError when the environment cannot be made or a peer fails.
    """
    python = peer_python()
    for peer in PEERS:
        command = [str(python), "-m", f"bench.peers.{peer}", "--gigabytes", str(gigabytes)]
        with Load() as load:
            found = peer_output([*command, "--seconds", str(seconds)])
        for line in found.splitlines():
            if line.startswith("{"):
                yield Row(**json.loads(line), foreign_load=load.foreign)
