"""The only door to envpool: imports it the way it can draw, and knows its task names.

The wheel ships a private libEGL that hides the GL symbols from MuJoCo. Only a system libEGL loaded
globally before the first import of envpool mends that; afterwards drawing kills the process.
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import logging
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from system.errors import ConfigError, PreflightError

log = logging.getLogger(__name__)

OLDEST = (1, 2, 3)  # 0.8 with numpy 2 returned constant rows silently; below 1.2.3 EGL teardown crashes
EGL = "libEGL.so.1"


@functools.cache
def _load_egl_first() -> bool:
    """Load the system's EGL; False when it is absent or envpool was imported before us."""
    if "envpool" in sys.modules or not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL(EGL, mode=ctypes.RTLD_GLOBAL)
    except OSError:  # no GL on this machine: everything but pixels works without
        return False
    return True


def load_envpool() -> Any:
    """The envpool module. Raises: ConfigError when it is absent or too old."""
    _load_egl_first()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import envpool  # heavy, and absent on some platforms
    except ImportError as error:
        raise ConfigError(
            f"envpool is not usable here ({error}); install envpool>=1.2.3 (Linux x86_64 or aarch64, "
            "macOS arm64, Windows), or name the environment gym:<id>"
        ) from error
    found = tuple(int(part) for part in str(envpool.__version__).split(".")[:3] if part.isdigit())
    if found < OLDEST:
        raise ConfigError(
            f"envpool {envpool.__version__} must be >= 1.2.3: older ones return wrong rows; upgrade it"
        )
    return envpool


def prepare_pixels(task: str, kwargs: Mapping[str, Any], timeout: float) -> None:
    """Make sure that drawing works here before this process tries.

    Raises: PreflightError when a child process cannot draw, or envpool was imported too early.
    """
    said = _probe(task, repr(dict(kwargs)), timeout)
    if said:
        raise PreflightError(
            f"cannot draw pixels of envpool:{task} on this machine ({said}); install "
            "libegl1 libgl1 libopengl0 libegl-mesa0 libgl1-mesa-dri, or leave from_pixels out"
        )
    if sys.platform.startswith("linux") and not _load_egl_first():
        raise PreflightError(
            f"envpool was imported before {EGL}, so drawing would kill this process; "
            "let actors.envs.catalog.make_env import it first, or start Python with "
            f"LD_PRELOAD={EGL}"
        )


@functools.cache
def _probe(task: str, kwargs: str, timeout: float) -> str:
    """What went wrong when a child process drew one frame; empty when nothing did."""
    code = (
        f"import ctypes; ctypes.CDLL({EGL!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        f"import envpool; envpool.make({task!r}, env_type='gymnasium', num_envs=1, **{kwargs}).reset()"
    )
    if not sys.platform.startswith("linux"):
        code = code.split("\n", 1)[1]
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"no frame within {timeout:g} s"
    if done.returncode == 0:
        return ""
    return done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}"


def unknown_task(task: str, known: list[str]) -> str:
    """The message for a task envpool does not have, with the nearest ones."""
    near = difflib.get_close_matches(task, known, n=4, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else "list them with envpool.list_all_envs()"
    return f"envpool has no task {task!r}; {hint}"


def dmc_task(name: str) -> str:
    """The envpool task of a control suite name, e.g. walker_walk -> WalkerWalk-v1.

    Raises: ConfigError with the nearest names when there is none.
    """
    known = load_envpool().list_all_envs()
    by_flat = {task.lower(): task for task in known if task.endswith("-v1")}
    found = by_flat.get(f"{name.replace('_', '').replace('-', '').lower()}-v1")
    if found is None:
        camel = "".join(part.capitalize() for part in name.split("_"))
        raise ConfigError(f"dmc:{name} is no control suite task here: {unknown_task(f'{camel}-v1', known)}")
    return found
