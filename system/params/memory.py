"""Policy versions held in this process: the store the server serves from, and its in-memory twin.

`MemoryWeights` is WeightSink and WeightSource at once, for tests and for a whole run in one process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

import numpy as np

from system.errors import RejectedError
from system.params.frames import check_content
from system.weights import NO_VERSION, PolicyVersion, Weights

Held = TypeVar("Held")


class Versions(Generic[Held]):
    """The `keep` newest versions of something immutable. Safe to use from many threads."""

    def __init__(self, keep: int) -> None:
        assert keep >= 1, keep
        self._keep = keep
        self._held: OrderedDict[PolicyVersion, Held] = OrderedDict()
        self._lock = threading.Lock()

    def commit(self, version: PolicyVersion, item: Held) -> None:
        """Make `item` the newest. Raises: RejectedError (version) unless it is newer than all held."""
        with self._lock:
            newest = next(reversed(self._held), NO_VERSION)
            if version <= newest:
                raise RejectedError(
                    "version",
                    f"weights {tuple(version)} must be newer than {tuple(newest)}; another learner may be "
                    "publishing: stop it, or resume so that a new epoch begins",
                )
            self._held[version] = item
            while len(self._held) > self._keep:
                self._held.popitem(last=False)

    def newest(self) -> tuple[PolicyVersion, Held | None]:
        """The newest version with its item; (NO_VERSION, None) while empty."""
        with self._lock:
            return next(reversed(self._held.items()), (NO_VERSION, None))

    def exactly(self, version: PolicyVersion) -> Held:
        """Raises: RejectedError (unknown) when `version` is not, or no longer, held."""
        with self._lock:
            found, held = self._held.get(version), [tuple(v) for v in self._held]
        if found is None:
            raise RejectedError(
                "unknown", f"weights {tuple(version)} must be one of {held}; ask for the newest instead"
            )
        return found


class MemoryWeights:
    """The parameter server without a wire: same checks, same answers, always at once."""

    def __init__(self, *, keep: int = 2) -> None:
        self._versions: Versions[Weights] = Versions(keep)

    def publish(self, weights: Weights) -> None:
        """Raises: RejectedError (version, digest, nonfinite)."""
        check_content(weights)
        self._versions.commit(weights.version, _frozen(weights))

    def newest(self, timeout: float) -> PolicyVersion:
        return self._versions.newest()[0]

    def latest(self, newer_than: PolicyVersion, timeout: float) -> Weights | None:
        version, weights = self._versions.newest()
        return weights if version > newer_than else None

    def exactly(self, version: PolicyVersion, timeout: float) -> Weights:
        """Raises: RejectedError (unknown) for a version not held."""
        return self._versions.exactly(version)

    def close(self) -> None:
        pass


def _frozen(weights: Weights) -> Weights:
    """A copy whose arrays nobody can write to, as one read off the wire."""
    arrays = {name: np.array(array) for name, array in weights.arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return Weights(version=weights.version, arrays=arrays, digest=weights.digest)
