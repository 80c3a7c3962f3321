"""Learner ranks under torchrun: `torchrun --nproc-per-node N --max-restarts 20 -m deploy.torchrun RUN_DIR`.

The run is `dreamfleet train RECIPE --backend local --set learner.launch=torchrun --set learner.ranks=N`,
started before or after. Each process here becomes the rank that torchrun numbered it. When a rank is lost all
end, torchrun starts them again, and they take the next life of their ranks, from the newest checkpoint.
Whatever sets RANK and WORLD_SIZE can stand in for torchrun. All on one machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from deploy.log_lines import log_to_stderr
from deploy.offers import claim
from deploy.role_process import Reporter, die_with_parent, run
from deploy.roles import RoleSpec
from deploy.run_dir import RunDirectory, write_atomic
from system.errors import ConfigError, DreamfleetError

log = logging.getLogger(__name__)
WATCH_SECONDS = 0.5
LAST_SECONDS = 20.0
USAGE = "python -m deploy.torchrun RUN_DIR (a directory that dreamfleet train made, or is about to)"


def rank_of(environment: dict[str, str]) -> tuple[int, int]:
    """(rank, ranks) as torchrun says. Raises: ConfigError without it, or for ranks on several machines."""
    try:
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK and WORLD_SIZE must be numbers in the environment ({error!r}); start this by torchrun: "
            "torchrun --nproc-per-node N -m deploy.torchrun RUN_DIR"
        ) from error
    if not 0 <= rank < ranks:
        raise ConfigError(
            f"RANK ({rank}) must be from 0 to WORLD_SIZE - 1 ({ranks - 1}); number the processes from 0 on"
        )
    if environment.get("LOCAL_WORLD_SIZE", str(ranks)) != str(ranks):
        raise ConfigError(
            f"{ranks} ranks on several machines (LOCAL_WORLD_SIZE {environment['LOCAL_WORLD_SIZE']}) cannot "
            "be: all ranks read what the first one maps; use --nnodes 1"
        )
    return rank, ranks


def why_not(path: Path, ranks: int) -> str:
    """What keeps the run from being one for so many ranks started by torchrun; empty when nothing does."""
    run_dir = RunDirectory(path)
    learner = run_dir.config()["learner"] if run_dir.exists else {"launch": "torchrun", "ranks": ranks}
    if (learner.get("launch"), learner.get("ranks")) == ("torchrun", ranks):
        return ""
    return (
        f"{run_dir.path} has learner.launch={learner.get('launch')} and learner.ranks="
        f"{learner.get('ranks')}, must have torchrun and {ranks}; resume it with --backend local "
        f"--set learner.launch=torchrun --set learner.ranks={ranks}, or give torchrun as many processes"
    )


def watch_driver(pid: int, stop: threading.Event) -> None:
    """Ask the role to stop when the run's driver is gone: its services are, too."""

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            driver = psutil.Process(pid)
            while driver.is_running():
                time.sleep(WATCH_SECONDS)
        log.warning("driver gone", extra={"pid": pid})
        stop.set()
        time.sleep(LAST_SECONDS)  # a role stuck in C code must not outlive its run
        os._exit(1)

    threading.Thread(target=watch, name="driver-watch", daemon=True).start()


def claim_from_living(path: Path, key: str, goes_on: Callable[[], bool]) -> RoleSpec | None:
    """As `claim`; what a driver offered that is gone since, killed before anybody came, is thrown away."""
    while (spec := claim(path, key, goes_on)) is not None:
        driver = int(spec.extra["driver"])
        if psutil.pid_exists(driver):
            break
        log.warning("offer of a driver that is gone", extra={"role": key, "pid": driver})
    return spec


def serve(path: Path, rank: int, ranks: int, stop: threading.Event) -> int:
    """Be one life of the rank. Returns the exit code."""
    if doubt := why_not(path, ranks):
        log.warning("waiting for another run", extra={"why": doubt})  # it may be resumed with other settings
    spec = claim_from_living(path, f"learner-{rank}", lambda: not stop.is_set())
    if spec is None:
        return 0
    reporter = Reporter(spec, lambda record: _keep(spec, record))
    if why := why_not(path, ranks):
        reporter.write("failed", error=why, kind=ConfigError.__name__, exit_code=ConfigError.exit_code)
        raise ConfigError(why)
    watch_driver(int(spec.extra["driver"]), stop)
    return run(spec, stop, reporter)


def _keep(spec: RoleSpec, record: dict[str, object]) -> None:
    path = Path(spec.run_dir) / "status" / f"{spec.key}.json"
    write_atomic(path, json.dumps(record, default=float))


def main() -> None:
    """Console entry."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s %(message)s")
    die_with_parent(os.getppid())
    try:
        if len(sys.argv) != 2:
            raise ConfigError(f"one argument is needed, {len(sys.argv) - 1} were given; usage: {USAGE}")
        code = serve(Path(sys.argv[1]), *rank_of(dict(os.environ)), stop)
    except DreamfleetError as error:
        log.error("rank refused", extra={"why": str(error)})
        code = error.exit_code
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # as every role: native pools need no teardown and may hang in it


if __name__ == "__main__":
    main()
