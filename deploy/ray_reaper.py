"""Ends what a killed driver would leave of its own local Ray: started beside it, alone in a process.

Ray's servers and roles die with the driver, but raylet's two agents wait a further minute for a control
store that is gone, and the session directory stays. Neighbour: `deploy.ray_fleet`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

import psutil

POLL_SECONDS = 0.5
SNAPSHOT_SECONDS = 10.0
"""Listing all processes costs milliseconds, so it is done seldom; the agents live from the start."""
GRACE_SECONDS = 1.0
"""What dies with the driver by itself is given this long."""


def below_raylet(driver: psutil.Process) -> set[psutil.Process]:
    """Everything the driver's raylet has started; the driver's other children are none of our business."""
    found: set[psutil.Process] = set()
    for child in driver.children():
        if child.name() == "raylet":
            found.update(child.children(recursive=True))
    return found


def main() -> None:
    """Arguments: pid of the driver, Ray's session directory."""
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the whole group; the driver decides
        signal.signal(number, signal.SIG_IGN)
    parent, directory = int(sys.argv[1]), sys.argv[2]
    known: set[psutil.Process] = set()
    snapshot_at = time.monotonic()
    while os.getppid() == parent:
        if time.monotonic() >= snapshot_at:
            with contextlib.suppress(psutil.Error):
                known |= below_raylet(psutil.Process(parent))
            known = {process for process in known if process.is_running()}
            snapshot_at = time.monotonic() + SNAPSHOT_SECONDS
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)
    for process in known:
        with contextlib.suppress(psutil.Error):
            process.kill()  # refuses by itself when the pid has gone to somebody else
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
