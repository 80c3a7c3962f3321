"""Ask an environment for its spec in a child process, where a crash in native code hurts nobody.

`python -m deploy.probe` reads {name, options, timeout} as JSON on standard input and prints the spec.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.errors import ConfigError, DreamfleetError, EnvError
from system.specs import EnvSpec

ANSWER = "DREAMFLEET-SPEC "
PROBE_SECONDS = 120.0


def probe_env(name: str, options: Mapping[str, Any]) -> EnvSpec:
    """The spec of an environment.

    Raises: the adapter's own ConfigError or EnvError; EnvError when the probe crashes or hangs.
    """
    question = json.dumps({"name": name, "options": dict(options)})
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deploy.probe"],
            input=question, capture_output=True, text=True, timeout=PROBE_SECONDS,
            env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EnvError(
            f"environment {name!r} gave no first observation within {PROBE_SECONDS:.0f} s; try it alone with "
            f"`dreamfleet env check {name}`"
        ) from error
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        tail = "\n".join(done.stderr.splitlines()[-5:])
        raise EnvError(
            f"environment {name!r} crashed while being made (exit code {done.returncode}):\n{tail}"
        )
    answer = json.loads(answers[-1].removeprefix(ANSWER))
    if "error" in answer:
        if answer["exit_code"] == ConfigError.exit_code:
            raise ConfigError(answer["error"])
        raise EnvError(f"{answer['error']}; mend it, and try it alone with `dreamfleet env check {name}`")
    return EnvSpec.from_json(answer["spec"])


def main() -> None:
    question = json.loads(sys.stdin.read())
    from actors.envs.catalog import make_env

    try:
        env = make_env(question["name"], 1, options=question["options"])
        env.start(0)
        env.recv(PROBE_SECONDS / 2)
        answer: dict[str, Any] = {"spec": env.spec.to_json()}
    except DreamfleetError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
