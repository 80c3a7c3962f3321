"""A real run on plain processes that is watched and broken from outside: for fault tests and `bench.chaos`.

Everything it knows comes from the run directory, as for a stranger; everything it does is a signal.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.run_dir import RunDirectory

CHECKOUT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 300.0
"""Only a hang lasts longer, even on a machine where importing torch takes a minute."""

TOY: dict[str, Any] = {
    "env": {"name": "toy:counter", "options": {"image_side": 8}},
    "env_steps": 1_000_000,
    "actors": {"count": 2, "envs": 2, "chunk_rows": 8, "chunk_seconds": 0.2},
    "replay": {"shards": 2, "capacity": 100_000, "train_ratio": 4, "prefill": 64},
    "learner": {
        "batch": 4, "length": 8, "publish_updates": 1, "checkpoint_seconds": 2, "settings": {"size": "nano"},
    },
    "evaluation": {"episodes": 2, "envs": 2},
}  # fmt: skip
"""A recipe whose every row is known beforehand: image and vector from `actors.envs.toy`."""


SHORT = TOY | {
    "env_steps": 400,
    "actors": TOY["actors"] | {"count": 1},
    "replay": TOY["replay"] | {"shards": 1},
    "learner": TOY["learner"] | {"checkpoint_seconds": 0.3, "keep_checkpoints": 3},
}
"""The same, over seconds after its processes have started."""
SCREEN_LINES = 24


def environment() -> dict[str, str]:
    """Environment of child processes: they find the checkout from any folder and use one thread."""
    path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a person sees of a command that has ended. Made by `dreamfleet`."""

    code: int
    out: str
    err: str

    def check_refused(self, code: int, *says: str) -> None:
        """Check that it ended with `code` and one screen that says what is wrong and what to do."""
        assert self.code == code, f"{self.code}\n{self.out}\n{self.err}"
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, self.err
        assert 1 <= len(lines) <= SCREEN_LINES, self.err
        message = "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :])
        for word in says:
            assert word in message, (word, message)


def dreamfleet(cwd: Path, *arguments: str | Path, seconds: float = PATIENCE_SECONDS) -> Outcome:
    """Run a command to its end. Raises: AssertionError when it takes too long or leaves a process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", *map(str, arguments)], cwd=cwd, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{arguments} still ran after {seconds:.0f} s\n{out}\n{err}") from None
    left = group_members(process.pid)
    assert not left, left
    return Outcome(code=process.returncode, out=out, err=err)


def group_members(group: int) -> list[psutil.Process]:
    """Every living process of a process group."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


class Drill:
    """`dreamfleet train` on the local backend in a process group of its own. Use as a context manager."""

    def __init__(self, root: Path, recipe: Mapping[str, Any] = TOY, name: str = "drill") -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._recipe = root / f"{name}.yaml"
        self._recipe.write_text(json.dumps({"name": name, "root": str(root / "runs"), **recipe}))
        self.run_dir = RunDirectory(root / "runs" / name)
        self.output = root / f"{name}.out"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Drill:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_everything()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "deploy", "train", str(self._recipe), "--backend", "local"]

    def start(self) -> Drill:
        """Run the command; always the same one."""
        assert self._process is None or self._process.poll() is not None, "it still runs"
        with self.output.open("ab") as out:
            self._process = subprocess.Popen(
                self.command, cwd=self._root, stdout=out, stderr=out, env=environment(),
                start_new_session=True,
            )  # fmt: skip
        return self

    # ---- watching -----------------------------------------------------------------------------------

    def record(self, key: str) -> dict[str, Any]:
        """Newest word of a role; empty before the first."""
        records = (r for r in self.run_dir.role_records() if f"{r['role']}-{r['index']}" == key)
        return next(records, {})

    def payload(self, key: str) -> dict[str, Any]:
        return self.record(key).get("payload", {})

    def incarnation(self, key: str) -> int:
        return int(self.record(key).get("incarnation", 0))

    @property
    def inserted(self) -> int:
        """Rows inserted as the shards that speak say."""
        return sum(
            int(r["payload"].get("inserted", 0)) for r in self.run_dir.role_records() if r["role"] == "shard"
        )

    @property
    def updates(self) -> int:
        return int(self.payload("learner-0").get("updates", 0))

    def running(self, key: str) -> bool:
        """Whether the role says so and its process lives."""
        record = self.record(key)
        return record.get("state") == "running" and psutil.pid_exists(int(record["pid"]))

    def wait_for(self, what: str, reached: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
        """Seconds until `reached`. Raises: AssertionError with the end of the output when it never is."""
        begin = time.monotonic()
        while not reached():
            code = None if self._process is None else self._process.poll()
            waited = time.monotonic() - begin
            if code is not None or waited > seconds:
                ended = f"the run ended with {code}" if code is not None else f"{waited:.0f} s passed"
                raise AssertionError(f"{ended} before: {what}\n{self.tail()}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - begin

    def wait_for_progress(
        self, seconds: float = PATIENCE_SECONDS, *, rows: int = 50, updates: int = 5
    ) -> float:
        """Seconds until that many more rows were inserted and updates done."""
        inserted, done = self.inserted, self.updates
        return self.wait_for(
            f"{rows} more rows than {inserted} and {updates} more updates than {done}",
            lambda: self.inserted >= inserted + rows and self.updates >= done + updates,
            seconds,
        )

    def tail(self) -> str:
        """The last lines of the command's output and of the logs of roles that failed."""
        parts = [self.output.read_text(errors="replace")[-3000:] if self.output.exists() else ""]
        parts += [
            f"{r['role']}-{r['index']}: {r.get('error', '')}"
            for r in self.run_dir.role_records()
            if r["state"] == "failed"
        ]
        return "\n".join(parts)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The command's exit code. Raises: AssertionError when it goes on."""
        assert self._process is not None, "start() first"
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command still runs after {seconds:.0f} s\n{self.tail()}") from None

    def processes(self) -> list[psutil.Process]:
        """Every living process of the command's group: supervisor, roles and what they started."""
        return [] if self._process is None else group_members(self._process.pid)

    # ---- breaking -----------------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command alone, as `kill` does."""
        assert self._process is not None, "start() first"
        self._process.send_signal(number)

    def interrupt(self) -> None:
        """SIGINT to the whole group, as Ctrl-C in a terminal does."""
        assert self._process is not None, "start() first"
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self, *keys: str) -> dict[str, dict[str, Any]]:
        """SIGKILL roles at once; return their last words before it."""
        records = {key: self.record(key) for key in keys}
        for record in records.values():
            os.kill(int(record["pid"]), signal.SIGKILL)
        return records

    def kill_everything(self) -> None:
        """SIGKILL the whole group at once, if it still runs."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        deadline = time.monotonic() + 10
        while self.processes():
            assert time.monotonic() < deadline, self.processes()
            time.sleep(POLL_SECONDS)
