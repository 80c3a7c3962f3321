"""Weights as a header frame and raw bytes, and back. Shared by the parameter server and its clients.

Nothing read here is trusted: the header is checked before a byte is allocated, the bytes against the
header, the whole against its digest.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.errors import RejectedError
from system.params.weights_pb2 import Frame
from system.weights import NO_VERSION, Digest, PolicyVersion, Weights, digest_of, nonfinite
from system.wire import FRAME_BYTES

ALIGN = 64
"""Every array starts at a multiple of this many bytes, so that views into one buffer are aligned."""
DTYPES = frozenset(
    [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)]
    + ["bool", "float16", "float32", "float64"]
)
ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,255}")
MAX_ARRAYS = 65_536
DEFAULT_LIMIT_BYTES = 4 << 30
"""400 million float32 parameters are 1.6 GB; more than 4 GiB is taken for a mistake unless asked for."""


def to_frames(weights: Weights) -> Iterator[Frame]:
    """Header frame, then the bytes of all arrays in name order in frames of at most FRAME_BYTES.

    Raises: RejectedError at once, not while iterating, for a name or dtype that cannot travel.
    """
    entries: list[dict[str, Any]] = []
    nbytes = 0
    for name in sorted(weights.arrays):
        array = weights.arrays[name]
        if array.dtype.name not in DTYPES or not ARRAY_NAME.fullmatch(name):
            raise RejectedError(
                "header",
                f"array {name!r} of dtype {array.dtype.name} cannot travel: the name must match "
                f"{ARRAY_NAME.pattern} and the dtype be one of {sorted(DTYPES)}; rename or cast it",
            )
        entries.append(
            {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": nbytes}
        )
        nbytes += _padded(array.nbytes)
    body = {
        "version": list(weights.version),
        "digest": weights.digest,
        "nbytes": nbytes,
        "arrays": entries,
    }
    header = Frame(header=json.dumps(body, separators=(",", ":")).encode())
    return chain((header,), _data_frames(weights.arrays, entries, nbytes))


def _data_frames(
    arrays: Mapping[str, NDArray[np.generic]], entries: list[dict[str, Any]], nbytes: int
) -> Iterator[Frame]:
    packed = np.zeros(nbytes, np.uint8)
    for entry in entries:
        array, at = arrays[entry["name"]], entry["offset"]
        packed[at : at + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
    view = packed.data
    for at in range(0, nbytes, FRAME_BYTES):
        yield Frame(data=bytes(view[at : at + FRAME_BYTES]))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def from_frames(frames: Iterable[Frame], *, limit_bytes: int, newer_than: PolicyVersion) -> Weights | None:
    """Rebuild weights from a stream, or None for a stream without frames. Arrays are read-only views.

    Raises: RejectedError (reason header, version, frame, oversize, truncated, digest or nonfinite)
    naming what was wrong; an old version is refused before its bytes are read.
    """
    stream = iter(frames)
    first = next(stream, None)
    if first is None:
        return None
    header = _Header(first, limit_bytes)
    if header.version <= newer_than:
        raise RejectedError(
            "version",
            f"weights {tuple(header.version)} must be newer than {tuple(newer_than)}; "
            "a restarted learner takes the next epoch",
        )
    buffer = np.empty(header.nbytes, np.uint8)
    arrays = {name: _view(buffer, dtype, shape, at) for name, dtype, shape, at in header.arrays}
    actual = _fill(stream, buffer, arrays)
    for array in arrays.values():
        array.flags.writeable = False
    weights = Weights(version=header.version, arrays=arrays, digest=header.digest)
    _check_content(weights, actual)
    return weights


def check_content(weights: Weights) -> None:
    """Raises: RejectedError (digest, nonfinite) when bytes and digest disagree or a float is not finite."""
    _check_content(weights, digest_of(weights.arrays))


def _check_content(weights: Weights, actual: str) -> None:
    if actual != weights.digest:
        raise RejectedError(
            "digest",
            f"weights {tuple(weights.version)} have digest {actual[:12]}, must be {weights.digest[:12]}; "
            "send them again, and check the link if it repeats",
        )
    if broken := nonfinite(weights.arrays):
        raise RejectedError(
            "nonfinite",
            f"weights {tuple(weights.version)} hold NaN or infinity in {broken[:3]}; roll the learner back",
        )


def _fill(
    stream: Iterator[Frame], buffer: NDArray[np.uint8], arrays: Mapping[str, NDArray[np.generic]]
) -> str:
    """Copy all data frames into `buffer` and return the digest of the arrays that lie in it.

    Each array is hashed as soon as it is whole, while the network fetches the next frames.
    """
    nbytes, target, position = len(buffer), buffer.data, 0
    digest, waiting, whole = Digest(), deque(arrays.items()), 0
    for frame in stream:
        data, due = frame.data, min(FRAME_BYTES, nbytes - position)
        if due == 0:
            raise RejectedError(
                "oversize", f"stream carries more than the {nbytes} bytes its header declares; send it again"
            )
        if len(data) != due:
            raise RejectedError(
                "frame", f"frame at byte {position} must carry {due} bytes of data, has {len(data)}"
            )
        target[position : position + due] = data
        position += due
        while waiting and whole + _padded(waiting[0][1].nbytes) <= position:
            name, array = waiting.popleft()
            digest.update(name, array)
            whole += _padded(array.nbytes)
    if position != nbytes:
        raise RejectedError(
            "truncated", f"stream ended after {position} bytes, its header declares {nbytes}; send it again"
        )
    for name, array in waiting:  # empty ones, which no frame completes
        digest.update(name, array)
    return digest.hexdigest()


def _view(
    buffer: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], at: int
) -> NDArray[np.generic]:
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.frombuffer(buffer, dtype, math.prod(shape), at).reshape(shape)


def _fits(shape: tuple[int, ...]) -> bool:
    """True for shapes numpy can make, also when one size is 0."""
    return len(shape) <= 32 and math.prod(max(n, 1) for n in shape) < 2**56


class _Header:
    """A checked header: layout is exactly the one to_frames would have made."""

    def __init__(self, frame: Frame, limit_bytes: int) -> None:
        if frame.WhichOneof("body") != "header" or len(frame.header) > 16 * FRAME_BYTES:
            raise RejectedError("header", "the first frame must be a header; use our client to publish")
        try:
            self._parse(json.loads(frame.header))
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise RejectedError(
                "header", f"weights header cannot be read ({error!r:.200}); use our client to publish"
            ) from error
        if self.nbytes > limit_bytes:
            raise RejectedError(
                "oversize",
                f"weights of {self.nbytes} bytes must be <= {limit_bytes}; send only what acting needs "
                "or raise the parameter server's limit_bytes",
            )

    def _parse(self, body: Any) -> None:
        epoch, counter = body["version"]
        if (
            type(epoch) is not int
            or type(counter) is not int
            or not (0 <= epoch < 2**23 and 0 <= counter < 2**40)
        ):
            raise ValueError(f"version {body['version']!r} must be two small non-negative integers")
        self.version = PolicyVersion(epoch, counter)
        if self.version <= NO_VERSION:
            raise ValueError("version (0, 0) means none")
        self.digest = body["digest"]
        if not isinstance(self.digest, str) or not re.fullmatch(r"[0-9a-f]{64}", self.digest):
            raise ValueError("digest must be 64 hex digits")
        if len(body["arrays"]) > MAX_ARRAYS:
            raise ValueError(f"more than {MAX_ARRAYS} arrays")
        self.arrays: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
        end, last = 0, ""
        for entry in body["arrays"]:
            name, shape = entry["name"], tuple(entry["shape"])
            if not ARRAY_NAME.fullmatch(name) or entry["dtype"] not in DTYPES or name <= last:
                raise ValueError(f"array {name!r:.80}: bad name, dtype or order")
            if any(type(n) is not int or n < 0 for n in shape) or not _fits(shape):
                raise ValueError(f"array {name!r}: shape {shape!r:.80} must be sizes >= 0")
            if entry["offset"] != end:
                raise ValueError(f"array {name!r}: offset {entry['offset']!r:.40} must be {end}")
            dtype = np.dtype(entry["dtype"])
            self.arrays.append((name, dtype, shape, end))
            end, last = end + _padded(dtype.itemsize * math.prod(shape)), name
        if body["nbytes"] != end:
            raise ValueError(f"nbytes {body['nbytes']!r:.40} must be {end}")
        self.nbytes = end
