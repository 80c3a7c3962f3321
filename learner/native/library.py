"""The compiled library of this process: built and loaded on first use, or known to be absent."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess

from learner.native.build import load_library

log = logging.getLogger(__name__)


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why there is none); tried once per process, so there is one line in the log."""
    try:
        return load_library(), ""
    except subprocess.CalledProcessError as error:
        cause = f"{error}: {error.stderr[-300:]!r}"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        cause = str(error)
    log.info("learner runs without compiled regions", extra={"cause": cause})
    return None, cause


def available() -> bool:
    """Whether the compiled regions can be had here; builds them on the first call."""
    return _found()[0] is not None


def absence() -> str:
    """Why there is no library; empty when there is one."""
    return _found()[1]


def library() -> ctypes.CDLL:
    """The library, to be called only where `available`."""
    loaded = _found()[0]
    assert loaded is not None, absence()
    return loaded
