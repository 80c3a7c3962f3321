"""Shows that training and measuring the learner need neither ray nor envpool: in a venv without them.

`python -m bench.bare [FOLDER]` makes the venv in FOLDER (default .venv-bare; kept, so a second time is
quick), installs every dependency but those two as pinned, and runs both. Exit code 0 when all of it works.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("ray", "envpool")
INSTALL_SECONDS = 1800.0
RUN_SECONDS = 900.0
TRAIN = (
    "env.name=gym:CartPole-v1", "env_steps=3000", "actors.count=1", "replay.shards=1", "replay.train_ratio=4",
    "learner.batch=8", "evaluation.episodes=4",
)  # fmt: skip
REFUSE = f"""
import importlib.util
found = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
raise SystemExit(f"these must be absent: {{found}}" if found else 0)
"""


def requirements() -> list[str]:
    """The declared dependencies without the two; torch first, as in `make setup`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line: re.match(r"[\w-]+", line) for line in project["dependencies"]}
    kept = [line for line, name in names.items() if name and name[0].lower() not in ABSENT]
    return sorted(kept, key=lambda line: not line.startswith("torch>"))


def run(command: list[str | Path], seconds: float) -> str:
    """Standard output of a command in the checkout. Raises: SystemExit with its last lines when it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True, check=False
    )
    if done.returncode:
        shown = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        words = " ".join(map(str, command))
        raise SystemExit(f"bare: {words} ended with exit code {done.returncode}\n{shown}")
    return done.stdout


def make(folder: Path) -> Path:
    """The interpreter of the bare environment, made and filled when it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
    ]
    run([*pip, *requirements(), "-c", ROOT / "constraints.txt"], INSTALL_SECONDS)
    run([python, "-c", REFUSE], 60.0)
    return python


def train(python: Path) -> str:
    """The last line of a short training run on plain processes."""
    with tempfile.TemporaryDirectory(prefix="bench-bare-") as root:
        settings = [word for pair in (*TRAIN, f"root={root}") for word in ("--set", pair)]
        command = [python, "-m", "deploy", "train", "cartpole", "--backend", "local", *settings]
        last = run(command, RUN_SECONDS).splitlines()[-1]
        run([python, "-m", "deploy", "audit", f"{root}/cartpole-0"], 120.0)
    if not last.startswith("evaluation return "):
        raise SystemExit(f"bare: training ended with {last!r}, must end with its evaluation return")
    return last


def measure(python: Path) -> list[str]:
    """The rows of a short learner benchmark."""
    command = [
        python,
        "-m",
        "bench",
        "learner",
        "--json",
        "--case",
        "vector",
        "--size",
        "nano",
        "--seconds",
        "3",
    ]
    rows = [json.loads(line) for line in run([*command], RUN_SECONDS).splitlines()]
    if "update_ms" not in {row["metric"] for row in rows}:
        raise SystemExit(f"bare: the learner benchmark printed no update_ms, only {rows}")
    return [f"{row['case']} {row['metric']} {row['value']:.4g} {row['unit']}" for row in rows]


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0] if arguments else ROOT / ".venv-bare").absolute()
    begun = time.monotonic()
    python = make(folder)
    print(f"bare environment {folder} without {' and '.join(ABSENT)} ({time.monotonic() - begun:.0f} s)")
    print(f"dreamfleet train gym:CartPole-v1 --backend local: {train(python)}")
    print("bench learner: " + "; ".join(measure(python)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
