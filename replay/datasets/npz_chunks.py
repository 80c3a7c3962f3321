"""Reads replay chunks in the npz layout of the DreamerV3 reference code (github.com/danijar/dreamerv3).

A file `TIME-ID-NEXT-LENGTH.npz` holds LENGTH consecutive rows of one worker and names its successor; rows
keep our convention (reward and flags on arriving, the action chosen there). Chains of files are followed and
cut into episodes at is_first. Beginnings and ends without their other half are counted as skipped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.datasets.episodes import IDENTITY, Episode, Tally
from replay.datasets.inference import Casts, fit, inferred
from replay.datasets.npz import read_arrays, read_headers
from system.errors import SchemaError

CHUNK_NAME = re.compile(r"(?P<time>\w+)-(?P<id>\w+)-(?P<next>\w+)-(?P<length>\d+)\.npz")
NOT_OURS = ("stepid", "reset", "consec", "seed", *IDENTITY)
"""Bookkeeping arrays of that code, as are all with a slash in their name."""

Rows = dict[str, NDArray[Any]]


def is_chunked(directory: Path) -> bool:
    """Every npz file of the directory is named like a chunk."""
    names = [path.name for path in directory.glob("*.npz")]
    return bool(names) and all(CHUNK_NAME.fullmatch(name) for name in names)


class ChunkEpisodes:
    """EpisodeSource over a directory of chunks. `tally.skipped` counts rows of incomplete episodes."""

    def __init__(self, directory: Path, *, casts: Casts | None = None, drop: Collection[str] = ()) -> None:
        """Read all names and headers. Raises: SchemaError, IntegrityError as `NpzEpisodes`."""
        self._directory, self._casts = directory, casts or {}
        files = sorted(directory.glob("*.npz"))
        headers = {path.name: read_headers(path) for path in files}
        foreign = {key for found in headers.values() for key in found if "/" in key or key in NOT_OURS}
        self._chains = _chains([path.name for path in files])
        found = inferred(
            directory.name,
            headers.items(),
            lambda name, keys: read_arrays(directory / name, keys),
            self._casts,
            {*drop, *foreign},
        )
        self.about, self.rows = found.about, found.rows
        if self.about.action is None:
            raise SchemaError(
                f"{directory} holds chunks without action and reward; rename the files to read each as "
                "one clip"
            )
        self.tally = Tally()

    def __iter__(self) -> Iterator[Episode]:
        self.tally = Tally()
        for chain in self._chains:
            yield from self._episodes(chain)

    def _episodes(self, chain: list[str]) -> Iterator[Episode]:
        pending: list[Rows] = []  # of the episode that is open at the end of a chunk
        begun = ""
        for name in chain:
            path = self._directory / name
            rows = fit(str(path), self.about, read_arrays(path, list(self.about.columns)), self._casts)
            firsts = np.flatnonzero(rows["is_first"]).tolist()
            bounds = sorted({0, *firsts, len(rows["is_first"])})
            for begin, end in pairwise(bounds):
                piece = {key: values[begin:end] for key, values in rows.items()}
                if begin in firsts:
                    self.tally.skip("episode without its end", _count(pending))
                    pending, begun = [piece], f"{path} row {begin}"
                elif pending:
                    pending.append(piece)
                else:
                    self.tally.skip("episode without its beginning", end - begin)
                if pending and piece["is_last"][-1]:
                    yield Episode(name=f"{begun} (episode)", columns=_joined(pending))
                    pending = []
        self.tally.skip("episode without its end", _count(pending))


def _chains(names: list[str]) -> list[list[str]]:
    """File names in the order of their rows, one list per worker.

    Raises: SchemaError when successors run in a circle or two files claim one.
    """
    parts = {name: match for name in names if (match := CHUNK_NAME.fullmatch(name))}
    by_id = {match["id"]: name for name, match in parts.items()}
    following = {name: by_id.get(match["next"]) for name, match in parts.items()}
    claimed = [name for name in following.values() if name is not None]
    if len(set(claimed)) != len(claimed) or len(by_id) != len(names):
        raise SchemaError("two chunks have the same id or successor; keep the files of one replay per folder")
    chains: list[list[str]] = []
    for head in sorted(set(names) - set(claimed)):
        chain, at = [], head
        while at is not None:
            chain.append(at)
            at = following[at]
        chains.append(chain)
    if sum(map(len, chains)) != len(names):
        raise SchemaError("some chunks name each other as successors in a circle; restore their file names")
    return chains


def _count(pieces: list[Rows]) -> int:
    return sum(len(piece["is_first"]) for piece in pieces)


def _joined(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
