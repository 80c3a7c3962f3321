"""`dreamfleet train`: drive a session to its end, show progress, stop cleanly on SIGTERM or Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

from deploy.health import AlarmHistory
from deploy.progress import Display
from deploy.run_config import RunConfig
from deploy.session import Session
from system.config import Layers

RESUMABLE = 75


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag; a second signal ends at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: Any) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()


def _announce(session: Session, out: Any) -> None:
    config = session.config
    verb = "resuming" if session.resumed else "starting"
    what = (
        f"{config.env.name} on backend {config.backend}: {config.actors.count} actors x "
        f"{config.actors.envs} environments, {config.replay.shards} replay shards, "
        f"{config.learner.ranks} learner {'rank' if config.learner.ranks == 1 else 'ranks'} "
        f"({config.learner.family}, device {config.learner.device}), "
        f"train ratio {config.replay.train_ratio:g}"
    )
    if config.offline:
        named = ", ".join(f"{name} ({source.path})" for name, source in config.replay.sources.items())
        what = f"{config.updates} updates from {named}, without actors, on backend {config.backend}"
    out.write(f"{verb} {session.run_dir.path}\n  {what}\n")
    for change in session.changes:
        out.write(f"  changed since last time: {change}\n")
    out.flush()


def _make_session(config: RunConfig, layers: Layers, resume: str) -> Any:
    if config.backend == "ray":
        from deploy.ray_session import RaySession

        return RaySession(config, layers, resume=resume)
    return Session(config, layers, resume=resume)


def train_run(config: RunConfig, layers: Layers, *, resume: str = "auto", as_json: bool = False) -> int:
    """Run to the end and print the result. Returns the exit code: 0, or 75 when stopped on request."""
    out = sys.stderr if as_json else sys.stdout
    stop = StopRequest()
    session = _make_session(config, layers, resume)
    display: Display | None = None
    try:
        session.start()
        _announce(session, out)
        display = Display(f"dreamfleet train {config.name}", out)
        while not session.finished and not stop.event.is_set():
            display.show(session.step())
        display.close()
        if stop.event.is_set():
            session.halt()
            out.write(f"stopped on request; the same command resumes {session.run_dir.path}\n")
            return RESUMABLE
        summary = session.finish()
    finally:
        if display is not None:
            display.close()
        session.close()
    if as_json:
        sys.stdout.write(json.dumps(summary.to_dict()) + "\n")
    else:
        sys.stdout.write(
            f"run directory {summary.run_dir}\nlearning curve {summary.curve}\n"
            + "".join(f"prediction {path}\n" for path in summary.video)
            + f"{summary.env_steps} environment steps, {summary.updates} updates, {summary.seconds:.0f} s\n"
            f"evaluation return {summary.evaluation_return:.1f} over {summary.evaluation_episodes} episodes "
            f"(random {summary.random_return:.1f})\n"
            + "".join(f"{AlarmHistory(**alarm).text()}\n" for alarm in summary.alarms)
        )
    return 0
