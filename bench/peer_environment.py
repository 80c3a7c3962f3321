"""The environment in which other projects are measured, made on first use; none is a dependency of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from system.errors import InfrastructureError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".build" / "peers"
REQUIREMENTS = (
    ("torch==2.13.0",),
    ("torchrl==0.14.1", "tensordict==0.14.3"),
    ("dm-reverb[tensorflow]==0.14.0",),
)
"""Installed in this order: torch alone first, so that what follows takes the same build as ours."""
INSTALL_SECONDS = 1800.0
RUN_SECONDS = 600.0
SPINS = "300000"
"""What libgomp does unless told otherwise: the learner room tells it, peers keep the default."""


def peer_python() -> Path:
    """Its interpreter; installs the peers when they are not there yet (minutes, 2 GB).

    Raises: InfrastructureError when it cannot be made.
    """
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "installed.json"
    wanted = json.dumps(REQUIREMENTS)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"bench: installing the peers in {ENVIRONMENT} (minutes)", file=sys.stderr, flush=True)
    peer_output([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], INSTALL_SECONDS)
    for requirements in REQUIREMENTS:
        peer_output([str(python), "-m", "pip", "install", "--quiet", *requirements], INSTALL_SECONDS)
    stamp.write_text(wanted)
    return python


def peer_output(command: list[str], seconds: float = RUN_SECONDS) -> str:
    """What a command prints. Raises: InfrastructureError when it fails or takes longer than `seconds`."""
    environment = {**os.environ, "GOMP_SPINCOUNT": SPINS}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(
            f"`{' '.join(command)}` ran for {seconds:g} s without ending; run it alone"
        ) from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise InfrastructureError(f"`{' '.join(command)}` ended with exit code {done.returncode}:\n{last}")
    return done.stdout
