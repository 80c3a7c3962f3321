"""Pixels of MuJoCo tasks: drawn, or refused with a remedy; never a dead process. Each in a child."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
DRAW = """
from actors.envs.catalog import make_env
from system.errors import PreflightError
options = {"from_pixels": True, "render_width": 64, "render_height": 64, "action_repeat": 2}
try:
    env = make_env("dmc:cartpole_balance", 2, options=options)
except PreflightError as error:
    print("refused", error)
else:
    env.start(0)
    step = env.recv(30.0)
    frame = step.obs["image"]
    print("drawn", frame.shape, frame.dtype, frame.std() > 1)
    env.close()
"""


def child(code):
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_pixels_are_drawn_or_refused_with_the_packages_to_install():
    said = child(DRAW)
    assert said == "drawn (2, 64, 64, 3) uint8 True" or ("refused" in said and "libegl1" in said), said


def test_pixels_are_refused_when_envpool_was_imported_too_early():
    said = child("import envpool\n" + DRAW)
    assert said.startswith("refused"), said
    assert "libEGL" in said or "libegl1" in said
