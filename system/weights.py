"""Versioned policy weights: flat named arrays, a version that only grows, a digest over the bytes.

Made by Agent.weights on the learner, carried by `system.params`, taken by Policy.load on actors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from system.errors import IntegrityError

COUNTER_BITS = 40


class PolicyVersion(NamedTuple):
    """Ordered (epoch, counter): a restarted learner takes a new epoch, so versions never go back."""

    epoch: int
    counter: int

    @property
    def encoded(self) -> int:
        """The int64 that rides in each row's policy_version column."""
        return (self.epoch << COUNTER_BITS) | self.counter

    @classmethod
    def decode(cls, value: int) -> PolicyVersion:
        return cls(value >> COUNTER_BITS, value & ((1 << COUNTER_BITS) - 1))


NO_VERSION = PolicyVersion(0, 0)


class Digest:
    """sha256 over names, dtypes, shapes and bytes of arrays given in name order, one at a time."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, name: str, array: NDArray[np.generic]) -> None:
        array = np.ascontiguousarray(array).reshape(array.shape)  # which makes 0-d arrays 1-d
        self._sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        self._sha.update(array.reshape(-1).data.cast("B") if array.size else b"")

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def digest_of(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes in name order."""
    digest = Digest()
    for name in sorted(arrays):
        digest.update(name, arrays[name])
    return digest.hexdigest()


def nonfinite(arrays: Mapping[str, NDArray[np.generic]]) -> list[str]:
    """Names of the floating-point arrays that hold NaN or infinity."""
    return [k for k, v in arrays.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One immutable set of policy weights."""

    version: PolicyVersion
    arrays: Mapping[str, NDArray[np.generic]]
    digest: str

    @classmethod
    def of(cls, version: PolicyVersion, arrays: Mapping[str, NDArray[np.generic]]) -> Weights:
        return cls(version=version, arrays=arrays, digest=digest_of(arrays))

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays.values())

    def verify(self) -> Weights:
        """Return self. Raises: IntegrityError when bytes and digest disagree."""
        actual = digest_of(self.arrays)
        if actual != self.digest:
            raise IntegrityError(
                f"weights {tuple(self.version)} have digest {actual[:12]}, must be {self.digest[:12]}; "
                "fetch them again, and check the link or disk if it repeats"
            )
        return self
