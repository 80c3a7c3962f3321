"""Progress a person can read: a live panel on a terminal, plain lines when piped. Also the metric files."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from deploy.driver import Progress
from deploy.run_dir import append_text, written

if TYPE_CHECKING:
    from rich.live import Live

LINE_SECONDS = 10.0


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def fields(progress: Progress) -> dict[str, str]:
    """Label -> text, in reading order."""
    score = "-" if progress.return_mean is None else f"{progress.return_mean:.1f}"
    ratio = "-" if progress.train_ratio is None else f"{progress.train_ratio:.2f}"
    out = {
        "time": _duration(progress.seconds),
        "env steps": f"{progress.env_steps}/{progress.env_steps_asked} ({progress.env_rate:.0f}/s)",
        "episodes": str(progress.episodes),
        "return (last 20)": score,
        "updates": f"{progress.updates} ({progress.update_rate:.1f}/s)",
        "train ratio": f"{ratio} of {progress.train_ratio_asked:g}",
        "policy": f"v{progress.policy_version}, lag {progress.policy_lag:.1f}",
        "actors": f"{progress.actors}, restarts {progress.restarts}",
        "ETA": _duration(progress.eta_seconds),
    }
    if progress.who_waits:
        out["last minute"] = progress.who_waits
    if progress.alarms:
        out["alarms"] = f"{', '.join(progress.alarms)} (dreamfleet status says more)"
    if progress.waiting:
        # The whole sentence, with its numbers, is in the learner's status.
        out["learner waits for"] = progress.waiting.split("waits for ")[-1].split(" (")[0]
    return out


class Display:
    """Shows progress until closed; falls back to one line every ten seconds when not on a terminal."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._title = title
        self._live: Live | None = None
        self._last_line = -LINE_SECONDS
        if self._stream.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4, transient=False)
            self._live.start()

    def show(self, progress: Progress) -> None:
        if self._live is not None:
            self._live.update(self._panel(progress))
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._stream.write("  ".join(f"{k} {v}" for k, v in fields(progress).items()) + "\n")
            self._stream.flush()

    def _panel(self, progress: Progress) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for label, text in fields(progress).items():
            table.add_row(f"[dim]{label}", text)
        table.add_row("", ProgressBar(total=progress.env_steps_asked, completed=progress.env_steps, width=40))
        return Panel(table, title=self._title, expand=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class MetricFiles:
    """metrics/metrics.jsonl and TensorBoard events, one record per `seconds`; x is environment steps."""

    def __init__(self, directory: Path, seconds: float = 2.0) -> None:
        # SummaryWriter writes in a thread that dies with a full disk and then blocks its callers for ever.
        from tensorboardX.event_file_writer import EventsWriter

        self._path = directory / "metrics.jsonl"
        with written(directory):
            self._board = EventsWriter(str(directory / "events"))
        self._seconds, self._last = seconds, -math.inf

    def write(self, progress: Progress, *, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last < self._seconds and not force:
            return
        self._last = now
        scalars: dict[str, float] = {
            "env/steps_per_second": progress.env_rate,
            "env/episodes": progress.episodes,
            "learner/updates": progress.updates,
            "learner/updates_per_second": progress.update_rate,
            "learner/policy_lag_versions": progress.policy_lag,
            "fleet/actors": progress.actors,
            "fleet/restarts": progress.restarts,
        }
        if progress.return_mean is not None:
            scalars["env/return_last20"] = progress.return_mean
        if progress.train_ratio is not None:
            scalars["learner/train_ratio"] = progress.train_ratio
        scalars |= {f"learner/{key}": float(value) for key, value in progress.learner.items()}
        self._record(scalars, progress.env_steps)

    def scalar(self, name: str, value: float, env_steps: int) -> None:
        self._record({name: value}, env_steps)

    def _record(self, scalars: Mapping[str, float], env_steps: int) -> None:
        """Raises: PreflightError when the disk is full."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        now = time.time()
        record = {"schema": 1, "time": now, "env_steps": env_steps, **scalars}
        append_text(self._path, json.dumps(record) + "\n")
        with written(self._path.parent):
            for key, value in scalars.items():
                event = Event(wall_time=now, step=env_steps, summary=scalar(key, value))
                self._board.write_event(event)
            self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # was raised by the write that failed
            self._board.close()
