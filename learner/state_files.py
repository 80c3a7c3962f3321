"""The two files of a saved state, written through and read back. Neighbours: `state_tree`, `checkpoint`.

The arrays file is written by hand in the safetensors layout (header length, JSON header, raw bytes):
that hashes while it writes, copies nothing, and turns a full disk into an OSError. It is read by the
safetensors library, which checks the header against the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from learner.state_tree import join_state
from system.errors import IntegrityError

MAX_JSON_BYTES = 256 << 20
SAFETENSORS_DTYPES = {
    **{f"{k}{bits}": f"{c}{bits}" for k, c in (("int", "I"), ("uint", "U")) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bool": "BOOL",
}


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> tuple[int, str]:
    """Write a safetensors file, flushed to the disk; return its size and sha256. Raises: OSError."""
    header: dict[str, Any] = {}
    # Widest items first, so that every array starts at a multiple of its item size.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    end = 0
    for name in names:
        array = arrays[name]
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name in names:
            flat = np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<")).reshape(-1)
            if flat.size:
                yield flat.view(np.uint8).data

    return _write(path, pieces())


def write_json(path: Path, tree: Mapping[str, Any]) -> tuple[int, str]:
    """Write a JSON file, flushed to the disk; return its size and sha256. Raises: OSError."""
    return _write(path, iter([json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()]))


def _write(path: Path, pieces: Iterator[Any]) -> tuple[int, str]:
    sha, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            sha.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, sha.hexdigest()


def read_state(state_file: Path, arrays_file: Path) -> dict[str, Any]:
    """Read a state back. Raises: IntegrityError naming the file that is not what write_* made."""
    try:
        with safe_open(arrays_file, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(arrays_file, error) from error
    try:
        if state_file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        state = join_state(json.loads(state_file.read_bytes()), arrays)
        if not isinstance(state, dict):
            raise ValueError("it must hold an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(state_file, error) from error
    return state


def _unreadable(file: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"checkpoint file {file} cannot be used ({error!r:.200}); resume from an older checkpoint or "
        "restore this one from a copy"
    )
