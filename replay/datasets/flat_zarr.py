"""A dataset as one flat Zarr v3 group that any Zarr reader opens.

    <key>            [rows, ...]   one array per column, all episodes one after the other
    episode_start    [E] int64     row of each episode's is_first
    episode_length   [E] int64

The group's attributes hold `dreamfleet`: format, what the arrays mean, and the size of every file, so that a
missing chunk is noticed: Zarr itself would read zeros. Chunks are zstd with a checksum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from replay.datasets.episodes import IDENTITY, About, Episode, about_of_json
from replay.datasets.inference import Casts, fit, inferred
from system.errors import IntegrityError, SchemaError

FORMAT = "dreamfleet-zarr-1"
CHUNK_BYTES = 4 << 20
MAX_CHUNK_ROWS = 16_384
INDEX = ("episode_start", "episode_length")
WINDOW_ROWS = 65_536

Array = zarr.Array[Any]


class ZarrSink:
    """Writes a flat group into an empty directory (see `whole`). Holds one chunk of each array in memory."""

    def __init__(self, directory: Path, about: About, rows: int) -> None:
        """`rows` is at least the number that will come; arrays are cut to what came."""
        self._group = zarr.create_group(directory, zarr_format=3, overwrite=True)
        self._directory, self._about = directory, about
        self._columns = {
            key: _Column(self._group, key, spec.shape, spec.dtype, spec.nbytes, rows)
            for key, spec in about.columns.items()
        }
        self._lengths: list[int] = []

    def write(self, episode: Episode) -> None:
        """Append one episode's rows."""
        for key, column in self._columns.items():
            column.append(episode.columns[key])
        self._lengths.append(len(episode))

    def finish(self) -> None:
        """Write what is buffered, the episode index and the attributes that make the group a dataset."""
        for column in self._columns.values():
            column.finish()
        lengths = np.asarray(self._lengths, np.int64)
        starts = np.cumsum(lengths) - lengths
        for name, values in zip(INDEX, (starts, lengths), strict=True):
            column = _Column(self._group, name, (), "int64", 8, len(values))
            column.append(values)
            column.finish()
        files = _files(self._directory)
        self._group.attrs["dreamfleet"] = {"format": FORMAT, "about": self._about.to_json(), "files": files}


class _Column:
    """One array that grows by whole chunks: a partial chunk would be read and written again."""

    def __init__(
        self, group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str, nbytes: int, rows: int
    ) -> None:
        self._chunk = int(min(MAX_CHUNK_ROWS, max(1, CHUNK_BYTES // max(1, nbytes))))
        self._array: Array = group.create_array(
            name,
            shape=(max(rows, 1), *shape),
            chunks=(self._chunk, *shape),
            dtype=dtype,
            fill_value=0,
            compressors=[ZstdCodec(level=1, checksum=True)],
            config={"write_empty_chunks": True},  # every chunk has a file, so that a lost one is noticed
        )
        self._buffer = np.zeros((self._chunk, *shape), dtype)
        self._used = self._written = 0

    def append(self, values: NDArray[Any]) -> None:
        """`values` is [n, ...]."""
        at = 0
        while at < len(values):
            count = min(len(values) - at, self._chunk - self._used)
            self._buffer[self._used : self._used + count] = values[at : at + count]
            self._used += count
            at += count
            if self._used == self._chunk:
                self._flush()

    def _flush(self) -> None:
        needed = self._written + self._used
        if needed > self._array.shape[0]:  # more came than was announced
            self._array.resize((needed, *self._array.shape[1:]))
        self._array[self._written : needed] = self._buffer[: self._used]
        self._written, self._used = needed, 0

    def finish(self) -> None:
        if self._used:
            self._flush()
        self._array.resize((self._written, *self._array.shape[1:]))


class ZarrEpisodes:
    """EpisodeSource over a flat group, ours or any that keeps the row convention."""

    def __init__(self, path: Path, *, casts: Casts | None = None, drop: Collection[str] = ()) -> None:
        """Raises: SchemaError for arrays that fit no row, IntegrityError for missing or damaged files."""
        self._path, self._casts = path, casts or {}
        try:
            group = zarr.open_group(path, mode="r")
            arrays: dict[str, Array] = dict(group.arrays())
        except (OSError, ValueError, KeyError) as error:
            raise IntegrityError(
                f"{path} cannot be opened as a Zarr group ({error}); check the path or copy it again"
            ) from error
        about = group.attrs.asdict().get("dreamfleet")
        columns = {k: a for k, a in arrays.items() if k not in INDEX and k not in IDENTITY and k not in drop}
        lengths = {key: array.shape[0] if array.ndim else 0 for key, array in columns.items()}
        if not columns or len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise SchemaError(
                f"{path} has arrays of lengths {lengths}, must have at least one and all the same number "
                "of rows; "
                "leave odd ones out with --drop KEY"
            )
        self._columns, self.rows = columns, next(iter(lengths.values()))
        if isinstance(about, Mapping):
            _check_files(path, about.get("files"))
            self.about = about_of_json(about.get("about"), f"{path}/zarr.json")
        else:
            headers = {key: (array.shape, np.dtype(array.dtype)) for key, array in columns.items()}
            named = [(str(path), headers)]
            self.about = inferred(path.name, named, lambda _, keys: self._maxima(keys), self._casts, ()).about
        self._starts, self._lengths = self._bounds(arrays)

    def __iter__(self) -> Iterator[Episode]:
        wanted = {key: self._columns[key] for key in self.about.columns if key in self._columns}
        windows = {key: _Window(f"{self._path}: {key}", array) for key, array in wanted.items()}
        for number, (start, length) in enumerate(zip(self._starts, self._lengths, strict=True)):
            name = f"{self._path} episode {number}"
            columns = {key: window.read(start, start + length) for key, window in windows.items()}
            yield Episode(name=name, columns=fit(name, self.about, columns, self._casts))

    def _maxima(self, keys: list[str]) -> dict[str, NDArray[Any]]:
        """For each integer array its largest values [1, ...], read a window at a time."""
        found: dict[str, NDArray[Any]] = {}
        for key in keys:
            array = self._columns[key]
            for start in range(0, self.rows, WINDOW_ROWS):
                values = _read(f"{self._path}: {key}", array, start, min(start + WINDOW_ROWS, self.rows))
                top = values.max(axis=0, keepdims=True)
                found[key] = np.maximum(found[key], top) if key in found else top
        return found

    def _bounds(self, arrays: Mapping[str, Array]) -> tuple[list[int], list[int]]:
        """First row and length of every episode, from the index arrays or else from is_first."""
        if all(name in arrays for name in INDEX):
            starts, lengths = (_read(f"{self._path}: {n}", arrays[n], 0, arrays[n].shape[0]) for n in INDEX)
        elif "is_first" in self._columns:
            flags = _read(f"{self._path}: is_first", self._columns["is_first"], 0, self.rows)
            starts = np.flatnonzero(flags)
            lengths = np.diff(np.append(starts, self.rows))
        else:
            raise SchemaError(
                f"{self._path} has neither {' and '.join(INDEX)} nor is_first; add either to say where "
                "episodes "
                "begin"
            )
        ends = np.asarray(starts) + np.asarray(lengths)
        gapless = (
            len(starts) > 0 and starts[0] == 0 and (starts[1:] == ends[:-1]).all() and ends[-1] == self.rows
        )
        if not gapless or (np.asarray(lengths) < 1).any():
            raise IntegrityError(
                f"{self._path}: its episodes must cover rows 0..{self.rows - 1} without gap or overlap, "
                "each with at "
                "least one row; mend the episode index, or copy the dataset again"
            )
        return starts.tolist(), lengths.tolist()


class _Window:
    """Rows of one array in order, read by whole chunks, each once."""

    def __init__(self, where: str, array: Array) -> None:
        self._where, self._array = where, array
        self._chunk = max(1, int(array.chunks[0]))
        self._start, self._rows = 0, np.empty((0, *array.shape[1:]), array.dtype)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        end = self._start + len(self._rows)
        if stop > end:
            upto = min(-(-stop // self._chunk) * self._chunk, self._array.shape[0])
            more = _read(self._where, self._array, end, upto)
            kept = self._rows[min(start, end) - self._start :]
            self._rows = np.concatenate([kept, more]) if len(kept) else more
            self._start = upto - len(self._rows)
        return self._rows[start - self._start : stop - self._start]


def _read(where: str, array: Array, start: int, stop: int) -> NDArray[Any]:
    try:
        return np.asarray(array[start:stop])
    except (OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"{where} rows {start}..{stop - 1} cannot be read ({error}); a chunk is damaged: copy the "
            "dataset again"
        ) from error


def _files(directory: Path) -> dict[str, int]:
    """Size of every chunk by path relative to the group."""
    chunks = (path for path in directory.rglob("c/*") if path.is_file())
    nested = (path for path in directory.rglob("c/**/*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in sorted({*chunks, *nested})}


def _check_files(directory: Path, files: Any) -> None:
    if not isinstance(files, Mapping):
        raise IntegrityError(f"{directory}/zarr.json lists no files; copy the dataset again")
    for name, nbytes in files.items():
        path = directory / str(name)
        actual = path.stat().st_size if path.is_file() else None
        if actual != nbytes:
            raise IntegrityError(
                f"{path} is {'missing' if actual is None else f'{actual} bytes long'}, must have "
                f"{nbytes} bytes "
                "(Zarr would read zeros); copy the dataset again"
            )
