"""What the kernel has of a mapped file in memory, and how to have it read more ahead of need."""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE
WILLNEED = 3  # MADV_WILLNEED, linux/mman-common.h

# Through ctypes, because mmap.madvise keeps the interpreter lock while the kernel queues the reads.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def read_ahead(address: int, nbytes: int) -> None:
    """Have the kernel read mapped bytes ahead. A hint: what fails is read when it is needed."""
    start = address // PAGE * PAGE
    _libc.madvise(start, address + nbytes - start, WILLNEED)


def is_resident(address: int) -> bool:
    """Whether the page of a mapped file at `address` is in memory; True where the kernel does not say."""
    answer = ctypes.create_string_buffer(1)
    failed = _libc.mincore(address // PAGE * PAGE, 1, answer)
    return bool(failed) or bool(answer.raw[0] & 1)
