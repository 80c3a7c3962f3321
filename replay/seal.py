"""The manifest of a segment that no longer grows: what it holds, and size and crc32c of every file.

`committed/sealed.json` of a raw or cold segment (inside an array, where zarr looks for no members), or the
`.far.json` file of one in an object store. Its presence says that the segment is sealed; written last, whole.
Overlays are not in it, they go on changing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from replay import layout
from system.errors import IntegrityError

NAME = "committed/sealed.json"
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing wrong with a segment. Made by `verify`, taken by quarantine and the command line."""

    reason: str  # missing | size | checksum | manifest | identity | rows | unreadable: the counter's label
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a sealed segment is. Made by `seal`, read back by `read_manifest`."""

    name: str  # without the ending that tells the tier
    tier: layout.Tier
    schema: str  # digest of the table
    replay: str  # id of the replay it belongs to
    origin: int  # the shard its rows were appended to
    number: int
    epoch: int
    rows: int  # T, rows a slot has room for
    committed: tuple[int, ...]  # [S]
    slots: tuple[tuple[int, int, int], ...]  # [S, 3] actor, env, position of the first row
    last: tuple[tuple[int, int, int, int], ...]  # [S, 4] incarnation, episode, step, is_last of the last row
    files: Mapping[str, tuple[int, int]]  # by relative path: size, crc32c
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what a tier adds, e.g. its URL

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def manifest_path(path: Path) -> Path:
    """Where the manifest of the segment at `path` lies, whichever its tier."""
    return path if path.name.endswith(layout.SUFFIXES["far"]) else path / NAME


def is_sealed(path: Path) -> bool:
    return manifest_path(path).is_file()


def file_checks(path: Path) -> dict[str, tuple[int, int]]:
    """Size and crc32c of every file below `path` but the manifest, by relative path."""
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return {
        name: _check(path / name) for name in names if not name.startswith("committed/.") and name != NAME
    }


def seal(path: Path, about: Manifest) -> Manifest:
    """Write the manifest `about` the segment at `path`; its `files` are read anew when it has none.

    Raises: PreflightError when the disk refuses.
    """
    files = about.files or file_checks(path)
    document = _document(about) | {"files": {name: list(pair) for name, pair in files.items()}}
    layout.write_json(manifest_path(path), document | {"digest": _digest(document)})
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """Raises: FileNotFoundError when the segment is not sealed; IntegrityError for a damaged manifest."""
    where = manifest_path(path)
    value = layout.read_json(where)
    if value is None:
        raise FileNotFoundError(where)
    digest = value.pop("digest", None)
    if digest != _digest(value):
        raise IntegrityError(f"{where} must have digest {_digest(value)[:12]} but says {str(digest)[:12]}")
    if value.pop("format", None) != layout.FORMAT:
        raise IntegrityError(f"{where} is not of replay format {layout.FORMAT}")
    try:
        return Manifest(
            **value
            | {
                "committed": tuple(value["committed"]),
                "slots": tuple((a, b, c) for a, b, c in value["slots"]),
                "last": tuple((a, b, c, d) for a, b, c, d in value["last"]),
                "files": {name: (size, crc) for name, (size, crc) in value["files"].items()},
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{where} lacks what a manifest holds ({error!r})") from error


def verify(path: Path, *, contents: bool = True) -> list[Damage]:
    """Everything about a sealed segment that is not as its manifest says.

    Reads every byte of its files, without `contents` only their sizes. The files of a far segment lie
    elsewhere: there only the manifest is verified.
    Raises: FileNotFoundError when it is gone or not sealed.
    """
    try:
        manifest = read_manifest(path)
    except IntegrityError as error:
        return [Damage(reason="manifest", what=str(error))]
    name = path.name.removesuffix(layout.SUFFIXES[manifest.tier])
    if name != manifest.name:
        return [Damage(reason="identity", what=f"{path.name} holds segment {manifest.name}")]
    found: list[Damage] = []
    for file, (size, crc) in manifest.files.items() if manifest.tier != "far" else ():
        try:
            actual = _check(path / file) if contents else ((path / file).stat().st_size, crc)
        except FileNotFoundError:
            found.append(Damage(reason="missing", what=f"{path / file} is missing"))
        except OSError as error:
            found.append(Damage(reason="unreadable", what=f"{path / file}: {error.strerror}"))
        else:
            if actual[0] != size:
                found.append(Damage(reason="size", what=f"{path / file} has {actual[0]} bytes, not {size}"))
            elif actual[1] != crc:
                found.append(
                    Damage(reason="checksum", what=f"{path / file} has crc32c {actual[1]:08x}, not {crc:08x}")
                )
    if found and not path.exists():
        raise FileNotFoundError(path)
    return found


def _check(path: Path) -> tuple[int, int]:
    """Size and crc32c by reading, not by a map: a file cut short under it does no harm."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = int(google_crc32c.extend(crc, block))
    return size, crc


def _document(about: Manifest) -> dict[str, Any]:
    # Through JSON and back, so that the digest is over what a reader finds.
    return json.loads(json.dumps({"format": layout.FORMAT} | asdict(about)))


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
