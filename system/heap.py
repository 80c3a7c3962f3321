"""Keeps the memory that one round frees for the next round: glibc would give it back to the system.

The system clears each page it hands out anew. An update on images frees and takes some 500 MB, and spent a
seventh of its time on that; a replay shard that takes appends of 6 MB spent as much.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os

log = logging.getLogger(__name__)

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # as in glibc's malloc.h
NEVER = -1
LARGEST = 32 << 20
"""Bytes: glibc takes no higher threshold for blocks with a mapping of their own."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory(*, one_heap: bool = False) -> bool:
    """Whether this process now keeps what it frees: not with another C library, nor one set up by hand.

    `one_heap`: all threads share one, for processes whose many threads take turns with large blocks; the heap
    that a thread has to itself is given back whatever the thresholds. Ask before threads are started.
    """
    if any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc: musl, macOS
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    if one_heap:
        mallopt(ARENA_MAX, 1)
    kept = bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, NEVER))
    log.info("freed memory is kept", extra={"kept": kept})
    return kept
