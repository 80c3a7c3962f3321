"""`dreamfleet status`: read a run directory as it is, whether or not the run is alive."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deploy.health import AlarmHistory, alarm_histories
from deploy.run_dir import RunDirectory, read_json
from system.errors import ConfigError, IntegrityError


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleLine:
    """One role's newest word."""

    role: str
    state: str
    pid: int
    incarnation: int
    seconds_ago: float
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run's state from its files."""

    run_dir: str
    alive: bool
    newest: dict[str, Any]  # last record of metrics.jsonl
    roles: list[RoleLine]
    checkpoints: list[str]
    alarms: list[AlarmHistory] = field(default_factory=list[AlarmHistory])  # those on first
    summary: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [f"{self.run_dir}: {'running' if self.alive else 'not running'}"]
        lines += [
            f"  {key:32} {value:.4g}" for key, value in self.newest.items() if isinstance(value, float | int)
        ]
        header = f"  {'role':12}{'state':10}{'pid':>8}{'life':>6}{'said':>8}  note"
        lines += [header] if self.roles else ["  no roles have reported"]
        lines += [
            f"  {r.role:12}{r.state:10}{r.pid:>8}{r.incarnation:>6}{r.seconds_ago:>7.0f}s  {r.note}"
            for r in self.roles
        ]
        lines += [f"  {alarm.text()}" for alarm in self.alarms]
        lines.append(f"  checkpoints: {', '.join(self.checkpoints) or 'none'}")
        if self.summary:
            lines.append(
                f"  finished: evaluation return {self.summary['evaluation_return']:.1f} over "
                f"{self.summary['evaluation_episodes']} episodes (random {self.summary['random_return']:.1f})"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunList:
    """All runs under one root."""

    runs: list[RunStatus]

    def to_dict(self) -> dict[str, Any]:
        return {"runs": [run.to_dict() for run in self.runs]}

    def text(self) -> str:
        if not self.runs:
            return "no runs here; start one with `dreamfleet train cartpole`"
        return "\n".join(
            f"{run.run_dir:48} {'running' if run.alive else 'finished' if run.summary else 'stopped':9} "
            f"{run.newest.get('env_steps', 0):>10} steps"
            for run in self.runs
        )


def _last_record(path: Path) -> dict[str, Any]:
    """Newest whole metric record; a torn last line (kill -9) is skipped."""
    if not path.exists():
        return {}
    for line in reversed(path.read_bytes()[-65536:].splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "learner/updates" in record:
            return record
    return {}


def _role_line(path: Path) -> RoleLine | None:
    try:
        record = read_json(path)
    except IntegrityError:
        return None
    pid = int(record.get("pid", 0))
    state = str(record.get("state", "?"))
    if state in ("running", "starting") and not psutil.pid_exists(pid):
        state = "dead"
    return RoleLine(
        role=f"{record['role']}-{record['index']}",
        state=state,
        pid=pid,
        incarnation=int(record.get("incarnation", 0)),
        seconds_ago=max(0.0, time.time() - float(record.get("time", 0.0))),
        note=_note(record),
    )


def _note(record: dict[str, Any]) -> str:
    """Why a role failed, or else what the learner's governor says."""
    if error := str(record.get("error", "")):
        return error.splitlines()[0]
    payload: dict[str, Any] = record.get("payload") or {}
    return str(payload.get("governor", {}).get("line", ""))


def run_status(path: Path) -> RunStatus:
    """Raises: ConfigError when `path` is no run directory."""
    run = RunDirectory(path)
    if not run.exists:
        raise ConfigError(
            f"{path} is not a run directory (no run.json); `dreamfleet status` alone lists runs"
        )
    roles = [line for p in sorted(run.status.glob("*.json")) if (line := _role_line(p)) is not None]
    return RunStatus(
        run_dir=str(run.path),
        alive=any(r.state in ("running", "starting") for r in roles),
        newest=_last_record(run.metrics / "metrics.jsonl"),
        roles=roles,
        checkpoints=sorted(p.name for p in run.checkpoints.glob("[0-9]*")),
        alarms=alarm_histories(run),
        summary=read_json(run.summary_file) if run.summary_file.exists() else {},
    )


def list_runs(root: Path) -> RunList:
    return RunList(runs=[run_status(p.parent) for p in sorted(root.glob("*/run.json"))])
