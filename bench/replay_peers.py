"""Runs other projects' replay buffers under our load, in one environment of their own beside this one.

The environment is made on first use (minutes, 2 GB) and kept; none of the peers is a dependency of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.load import Load, Row
from system.errors import InfrastructureError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".build" / "peers"
REQUIREMENTS = (
    ("torch==2.13.0",),
    ("torchrl==0.14.1", "tensordict==0.14.3"),
    ("dm-reverb[tensorflow]==0.14.0",),
)
"""Installed in this order: torch alone first, so that what follows takes the same build as ours."""
PEERS = ("memmap_gather", "torchrl_slices", "reverb_table")
INSTALL_SECONDS = 1800.0
RUN_SECONDS = 600.0


def peer_rows(gigabytes: float, seconds: float) -> Iterator[Row]:
    """append_rate, memcpy_rate and sample_rate (ratio to memcpy in the peer's own process) of every peer.

    Raises: InfrastructureError when the environment cannot be made or a peer fails.
    """
    python = _environment()
    for peer in PEERS:
        command = [str(python), "-m", f"bench.peers.{peer}", "--gigabytes", str(gigabytes)]
        with Load() as load:
            found = _output([*command, "--seconds", str(seconds)])
        for line in found.splitlines():
            if line.startswith("{"):
                yield Row(**json.loads(line), foreign_load=load.foreign)


def _environment() -> Path:
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "installed.json"
    wanted = json.dumps(REQUIREMENTS)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"bench: installing the peers in {ENVIRONMENT} (minutes)", file=sys.stderr, flush=True)
    _output([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], INSTALL_SECONDS)
    for requirements in REQUIREMENTS:
        _output([str(python), "-m", "pip", "install", "--quiet", *requirements], INSTALL_SECONDS)
    stamp.write_text(wanted)
    return python


def _output(command: list[str], seconds: float = RUN_SECONDS) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(
            f"`{' '.join(command)}` ran for {seconds:g} s without ending; run it alone"
        ) from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise InfrastructureError(f"`{' '.join(command)}` ended with exit code {done.returncode}:\n{last}")
    return done.stdout
