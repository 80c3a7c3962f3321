"""Episodes as npz files, one file per episode: `episode-0000012.npz` holds each array [T, ...] by its name.

`dataset.json`, written last, says what the arrays mean and lists the files with their rows and bytes. Folders
of npz files without one are read too, when they keep the row convention: `inferred` finds out what they hold.
Pickled arrays are refused; nothing a file says is executed.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from replay import layout
from replay.datasets.episodes import About, Episode, about_of_json
from replay.datasets.inference import Casts, fit, inferred
from system.errors import IntegrityError, SchemaError

FORMAT = "dreamfleet-npz-1"
MANIFEST = "dataset.json"
MAX_FILE_BYTES = 8 << 30
"""Larger arrays are refused before they are read: an episode must fit in memory."""

Headers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def write_arrays(path: Path, columns: Mapping[str, NDArray[Any]]) -> int:
    """An npz file of arrays by name, uncompressed; returns its bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, values in columns.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, np.ascontiguousarray(values), allow_pickle=False)
    return path.stat().st_size


def read_headers(path: Path) -> Headers:
    """Shapes and dtypes of all arrays of an npz file without reading them. Raises: IntegrityError."""
    found: Headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    shape, _, dtype = _header(member)
                    size = info.file_size - member.tell()
                if dtype.hasobject:
                    raise IntegrityError(
                        f"{path}: {key} is pickled (dtype object), which is never loaded; save it as "
                        "numbers, or "
                        "delete it from the file"
                    )
                if size != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or size > MAX_FILE_BYTES:
                    raise IntegrityError(
                        f"{path}: {key} has {size} bytes for {dtype}{list(shape)} (at most "
                        f"{MAX_FILE_BYTES >> 30} "
                        "GiB are read); the file is damaged: copy it again or remove it"
                    )
                found[key] = (shape, dtype)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error
    return found


def read_arrays(path: Path, keys: Collection[str]) -> dict[str, NDArray[Any]]:
    """Arrays of an npz file by name, their checksums verified. Raises: IntegrityError naming file and key."""
    found: dict[str, NDArray[Any]] = {}
    key = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for key in keys:
                data = archive.read(f"{key}.npy")  # checks the member's crc32
                stream = io.BytesIO(data)
                shape, fortran, dtype = _header(stream)
                flat = np.frombuffer(data, dtype, offset=stream.tell())
                found[key] = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except KeyError as error:
        raise SchemaError(
            f"{path} lacks the array {key}; every file of a dataset must hold the same keys: add it, or "
            "leave it "
            f"out everywhere with --drop {key}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as error:
        raise _damaged(path, error, key) from error
    return found


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(member)


def _damaged(path: Path, error: Exception, key: str = "") -> IntegrityError:
    what = f"{path}: {key}" if key else str(path)
    return IntegrityError(
        f"{what} cannot be read as npz ({error}); it is cut off, damaged or pickled: copy it again or "
        "remove it"
    )


class NpzSink:
    """Writes npz episodes into an empty directory (see `whole`)."""

    def __init__(self, directory: Path, about: About) -> None:
        self._directory, self._about = directory, about
        self._files: dict[str, list[int]] = {}

    def write(self, episode: Episode) -> None:
        """One more file."""
        name = f"episode-{len(self._files):07d}.npz"
        nbytes = write_arrays(self._directory / name, episode.columns)
        self._files[name] = [len(episode), nbytes]

    def finish(self) -> None:
        """The manifest, which makes the files a dataset."""
        value = {"format": FORMAT, "about": self._about.to_json(), "files": self._files}
        layout.write_json(self._directory / MANIFEST, value)


class NpzEpisodes:
    """EpisodeSource over a directory of npz episodes."""

    def __init__(self, directory: Path, *, casts: Casts | None = None, drop: Collection[str] = ()) -> None:
        """Read the manifest, or the headers of all files when there is none.

        Raises: IntegrityError for damaged or missing files, SchemaError for arrays that fit no row.
        """
        self._casts = casts or {}
        manifest = layout.read_json(directory / MANIFEST)
        if manifest is None:
            self._files = sorted(directory.glob("*.npz"))
            if not self._files:
                raise SchemaError(f"{directory} holds no npz file; give the folder that holds the episodes")
            found = inferred(
                directory.name,
                ((path.name, read_headers(path)) for path in self._files),
                lambda name, keys: read_arrays(directory / name, keys),
                self._casts,
                drop,
            )
            self.about, self.rows = found.about, found.rows
        else:
            self._files, self.rows = _listed(directory, manifest)
            self.about = about_of_json(manifest.get("about"), str(directory / MANIFEST))

    def __iter__(self) -> Iterator[Episode]:
        for path in self._files:
            columns = read_arrays(path, self._stored(path))
            yield Episode(name=str(path), columns=fit(str(path), self.about, columns, self._casts))

    def _stored(self, path: Path) -> list[str]:
        """The file's arrays that are ours; what is missing shows when the episode is checked."""
        headers = read_headers(path)
        return [key for key in self.about.columns if key in headers]


def _listed(directory: Path, manifest: Mapping[str, Any]) -> tuple[list[Path], int]:
    where = directory / MANIFEST
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        raise IntegrityError(
            f"{where} has format {manifest.get('format')!r}, this version reads {FORMAT!r}; export the "
            "dataset "
            "again, or remove the manifest to have the files read as they are"
        )
    rows = 0
    for name, entry in files.items():
        path = directory / name
        if Path(name).name != name or not (isinstance(entry, list) and len(entry) == 2):
            raise IntegrityError(f"{where} has the entry {name!r}: {json.dumps(entry)}, no file; restore it")
        actual = path.stat().st_size if path.is_file() else None
        if actual != entry[1]:
            raise IntegrityError(
                f"{path} is {'missing' if actual is None else f'{actual} bytes long'}, {MANIFEST} says "
                f"{entry[1]} "
                "bytes; copy the dataset again"
            )
        rows += int(entry[0])
    return [directory / name for name in files], rows
