"""How the 64-row chunks of a sealed column are packed: a trial decides per column, every chunk is checked.

All parameters of compression stand here. `replay.cold` writes and reads the files made of such chunks.
Measured on Atari frames (docs/performance.md): zstd without shuffle keeps the matches between frames that
blosc's blocks and shuffles lose; a crc32c of the packed bytes costs 1 us, zstd's own checksum of the
unpacked ones doubles the time of unpacking.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue]
from numpy.typing import NDArray

from replay.rows import NARROW_NBYTES
from system.errors import IntegrityError

Codec = Literal["plain", "checked", "packed"]
"""plain: bytes as in a raw segment, without a check of their own; checked: bytes + crc32c;
packed: zstd + crc32c of the packed bytes."""

LEVEL = 1
WIN = 3.0
"""A column is packed when its trial shrinks by more than this."""
TRIAL_CHUNKS = 4
CRC_NBYTES = 4

Bytes = NDArray[np.uint8]


def choose(chunks: Bytes, row_nbytes: int) -> Codec:
    """The codec of a column from chunks [n, bytes] spread over it; see `trial_chunks`."""
    if row_nbytes <= NARROW_NBYTES:  # unpacking a tiny chunk costs more than copying it
        return "plain"
    packed = sum(len(pack(chunk, "packed")) for chunk in chunks)
    return "packed" if packed * WIN < chunks.nbytes else "checked"


def trial_chunks(full: NDArray[np.int64]) -> NDArray[np.int64]:
    """TRIAL_CHUNKS of the chunk numbers `full` [n], evenly spread; all when there are fewer."""
    at = np.linspace(0, len(full) - 1, min(TRIAL_CHUNKS, len(full)))
    return full[at.round().astype(np.int64)]


def pack(chunk: Bytes, codec: Codec) -> bytes:
    """The stored bytes of one chunk [bytes]."""
    body = zstd.compress(chunk, LEVEL, False) if codec == "packed" else chunk.tobytes()
    return body if codec == "plain" else body + int(google_crc32c.value(body)).to_bytes(CRC_NBYTES, "little")


def checked(stored: Bytes) -> Bytes:
    """The body of a chunk without its crc32c. Raises: IntegrityError when they do not match."""
    body = stored[:-CRC_NBYTES]
    crc = int(google_crc32c.value(body)).to_bytes(CRC_NBYTES, "little")
    if len(body) == 0 or stored[-CRC_NBYTES:].tobytes() != crc:
        raise IntegrityError(f"chunk of {len(stored)} bytes must match its crc32c; take it from a copy")
    return body


def unpack(stored: Bytes, codec: Codec, target: Bytes) -> None:
    """Fill `target` [bytes] with one chunk. Raises: IntegrityError when `stored` is not what was packed."""
    body = stored if codec == "plain" else checked(stored)
    if codec == "packed":
        _decompress(body, target)
    elif len(body) == len(target):
        target[:] = body
    else:
        raise IntegrityError(f"chunk has {len(body)} bytes, must have {len(target)}; take it from a copy")


class Scratch:
    """Reused memory for one unpacked chunk, per thread. Remembers whose chunk it holds.

    One, not many: a chunk unpacked into memory that is still in the processor's cache takes 40 us, into
    memory that has left it 150 us, and random draws rarely come back to a chunk.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def chunk(self, key: tuple[object, ...], nbytes: int, fill: Callable[[Bytes], None]) -> Bytes:
        """Chunk `key` [nbytes], unpacked by `fill` when the scratch does not hold it already."""
        local = self._local
        if getattr(local, "key", None) == key:
            return local.memory[:nbytes]
        local.key = None
        if len(getattr(local, "memory", ())) < nbytes:
            local.memory = _page_aligned(nbytes)
        fill(local.memory[:nbytes])
        local.key = key
        return local.memory[:nbytes]


SCRATCH = Scratch()
"""Of this process: every home unpacks into the same few pages."""


def _page_aligned(nbytes: int) -> Bytes:
    """Numpy's own memory lies 16 bytes off a cache line, where large copies run at half speed."""
    whole = np.empty(nbytes + 4096, np.uint8)
    skip = -whole.ctypes.data % 4096
    return whole[skip : skip + nbytes]


class _Context:
    """A decompression context: making one anew takes 20 us, as long as unpacking half a chunk of frames."""

    def __init__(self) -> None:
        self.library = _library()
        self.handle = None if self.library is None else self.library.ZSTD_createDCtx()

    def __del__(self) -> None:
        if self.library is not None and self.handle:
            self.library.ZSTD_freeDCtx(self.handle)


class _PerThread(threading.local):
    """One context per thread, freed with it."""

    def __init__(self) -> None:
        self.context = _Context()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The zstd inside numcodecs; None where its functions are hidden."""
    library = ctypes.CDLL(zstd.__file__)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    try:
        library.ZSTD_createDCtx.restype = pointer
        library.ZSTD_freeDCtx.argtypes = (pointer,)
        library.ZSTD_decompressDCtx.restype = size
        library.ZSTD_decompressDCtx.argtypes = (pointer, pointer, size, pointer, size)
    except AttributeError:
        return None
    return library


_per_thread = _PerThread()


def _decompress(body: Bytes, target: Bytes) -> None:
    context = _per_thread.context
    library: Any = context.library
    if library is None or not context.handle:
        try:
            done = len(zstd.decompress(body, target))
        except RuntimeError as error:
            raise IntegrityError(f"chunk cannot be unpacked ({error}); take it from a copy") from error
    else:
        done = library.ZSTD_decompressDCtx(
            context.handle, target.ctypes.data, len(target), body.ctypes.data, len(body)
        )  # an error is a length beyond all others
    if done != len(target):
        raise IntegrityError(f"chunk must unpack to {len(target)} bytes, does not; take it from a copy")
