"""Live counters of one shard in a mapped file: the shard writes, readers on the node look.

`generation` grows whenever the set of segments changes, so that a reader lists the directory only then.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from system.errors import PreflightError

WORDS = ("generation", "inserted", "rows", "waiting", "streams", "epoch")
NBYTES = 4096


class Catalog:
    """Six int64 words, each written by one aligned store and so never seen torn.

    generation: changes of the segment set; inserted: lifetime rows; rows: live rows;
    waiting: rows that appends hold back for want of limiter credit; streams; epoch.
    """

    def __init__(self, directory: Path, *, writable: bool) -> None:
        path = directory / "catalog.bin"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY, 0o644)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PreflightError(f"cannot open {path} ({error.strerror}); fix its permissions") from error
        try:
            if writable:
                try:
                    os.posix_fallocate(handle, 0, NBYTES)
                except OSError as error:
                    raise PreflightError(f"cannot write {path} ({error.strerror}); free space") from error
            elif os.fstat(handle).st_size < NBYTES:
                raise FileNotFoundError(path)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(handle, NBYTES, access=access)
        finally:
            os.close(handle)
        self._words = np.frombuffer(self._map, np.int64, len(WORDS))

    def __getitem__(self, word: str) -> int:
        return int(self._words[WORDS.index(word)])

    def __setitem__(self, word: str, value: int) -> None:
        self._words[WORDS.index(word)] = value
