"""Where a replay table lies on disk, and the few small JSON files beside its segments.

<root>/table.json                      the schema, and those it had before (`replay.history`)
<root>/shard-0000/shard.json           geometry and capacity of this shard
<root>/shard-0000/ledger.json          epoch, what was evicted, cursor of every stream; ledger.copy.json again
<root>/shard-0000/catalog.bin          live counters, mapped by readers (`replay.catalog`)
<root>/shard-0000/shard.lock           held by the one owning process
<root>/shard-0000/00000012-e0003.zarr  segment 12, made in the shard's third life
<root>/shard-0000/00000012-e0003.overlay.zarr   its mutable columns
<root>/shard-0000/00000011-e0003.cold.zarr   a compressed segment, <...>.far.json one in an object store,
                                       whose narrow columns are in <...>.kept/
<root>/shard-0000/verified.json        segments that may be read, as their owner found them
<root>/shard-0000/quarantine/          damaged segments, each <name>-<reason>
<root>/shard-0000/from-0001/           segments adopted from shard 1, same names; rows keep their identity
<root>/shard-0000/.scratch/            unfinished and evicted segments; emptied when the owner opens
<root>/pins/                           what checkpoints hold on to (`replay.pins`)
<root>/.trash/                         what a restore took out (`replay.restore`), being deleted
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from replay.history import History, carried
from system.errors import IntegrityError, PreflightError, SchemaError
from system.specs import TableSpec

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of everything this package writes to disk."""
SEGMENT_NAME = re.compile(r"(\d{8})-e(\d{4,})(\.zarr|\.cold\.zarr|\.far\.json)")
SHARD_NAME = re.compile(r"shard-(\d{4,})")
ADOPTED_NAME = re.compile(r"from-(\d{4,})")
SCRATCH = ".scratch"
QUARANTINE = "quarantine"
VERIFIED = "verified.json"
CHANGE_SECONDS = 10.0
"""How long to wait for others who change table.json."""

Tier = Literal["raw", "cold", "far"]
SUFFIXES: dict[Tier, str] = {"raw": ".zarr", "cold": ".cold.zarr", "far": ".far.json"}
"""How a segment's name ends in each tier, the most local tier first: when two lie there, it wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSegment:
    """A published segment as its name tells. Made by `stored_segments`."""

    path: Path
    number: int
    epoch: int
    tier: Tier
    origin: int  # the shard its rows were appended to

    @property
    def stem(self) -> str:
        """What is common to the names of all tiers."""
        return self.path.name.removesuffix(SUFFIXES[self.tier])


def shard_dir(root: Path, index: int) -> Path:
    return root / f"shard-{index:04d}"


def shard_indices(root: Path) -> list[int]:
    """Indices of the shard directories under `root`, ascending."""
    try:
        names = [path.name for path in root.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := SHARD_NAME.fullmatch(name)))


def segment_name(number: int, epoch: int) -> str:
    """Directory name; the epoch fences off an owner that should be dead: it never shares a file."""
    return f"{number:08d}-e{epoch:04d}.zarr"


def tier_path(segment: Path, tier: Tier) -> Path:
    """Where the same segment lies in another tier."""
    return segment.with_name(segment.name.split(".")[0] + SUFFIXES[tier])


def overlay_path(segment: Path) -> Path:
    """The mutable columns of a segment, the same for all its tiers."""
    return segment.with_name(segment.name.split(".")[0] + ".overlay.zarr")


def kept_path(segment: Path) -> Path:
    """The narrow columns of a far segment, kept on this node."""
    return segment.with_name(segment.name.split(".")[0] + ".kept")


def segment_paths(directory: Path) -> dict[int, Path]:
    """Published raw segments of one shard directory by number, ascending."""
    return {s.number: s.path for s in stored_segments(directory) if s.tier == "raw"}


def stored_segments(directory: Path, origin: int = 0) -> list[StoredSegment]:
    """Published segments of all tiers in one directory, by number, epoch, then the most local tier first."""
    tiers: dict[str, Tier] = {suffix: tier for tier, suffix in SUFFIXES.items()}
    found = [
        StoredSegment(
            path=path, number=int(match[1]), epoch=int(match[2]), tier=tiers[match[3]], origin=origin
        )
        for path in directory.iterdir()
        if (match := SEGMENT_NAME.fullmatch(path.name))
    ]
    order = list(SUFFIXES)
    return sorted(found, key=lambda s: (s.number, s.epoch, order.index(s.tier)))


def adopted_dirs(directory: Path) -> dict[int, Path]:
    """Directories of segments that a shard adopted, by the shard their rows come from."""
    found = ((ADOPTED_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def make_dir(path: Path) -> None:
    """Raises: PreflightError when the directory cannot be made or is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(
            f"replay directory {path} cannot be made ({error.strerror}); choose a writable replay root"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PreflightError(f"replay directory {path} is not writable; fix permissions or choose another")


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replace `path` atomically; when `durable`, it is on the device afterwards.

    Raises: PreflightError when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_dir(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PreflightError(
            f"cannot write {path} ({error.strerror}); free space or fix permissions, then try again"
        ) from error


def sync_dir(path: Path) -> None:
    """Bring the names in a directory to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_dirs(segment: Path) -> None:
    """Bring all names of a published segment and its overlay to the device."""
    for group in (segment, overlay_path(segment)):
        for place, _, _ in os.walk(group):
            sync_dir(Path(place))
    sync_dir(segment.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None when there is no such file.

    Raises: IntegrityError when it is cut off or no JSON object; PreflightError when it is unreadable.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _broken(path, "not text") from error
    except OSError as error:
        raise PreflightError(f"cannot read {path} ({error.strerror}); fix its permissions") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, f"{error.msg} at character {error.pos} of {len(text)}") from error
    if not isinstance(value, dict):
        raise _broken(path, "no JSON object")
    return value


def _broken(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} must be a JSON object but is damaged ({why}); restore it from a copy, or move "
        f"{path.parent} away to start an empty replay"
    )


def open_table(root: Path, table: TableSpec, *, evolve: bool = False) -> str:
    """Make `root` a table of this schema, or check that it already is one; return the replay's id.

    With `evolve` a table of another schema goes on under this one, when its rows can be read so; its former
    schemas stay written down (`replay.history`). A table.json that is gone is made again from the segments.
    Raises: SchemaError when it holds another schema or format; IntegrityError when table.json is
    damaged; PreflightError when it cannot be read or written.
    """
    make_dir(root)
    path = root / "table.json"
    if not path.exists():
        history = carried_history(root) or History(table=table, replay=os.urandom(8).hex())
        draft = root / f".table-{os.getpid()}-{os.urandom(4).hex()}"
        write_json(draft, history.to_json(FORMAT))
        try:
            os.link(draft, path)  # fails when another shard was first: then its schema is compared
        except FileExistsError:
            pass
        except OSError as error:
            raise PreflightError(f"cannot write {path} ({error.strerror}); fix the replay root") from error
        finally:
            draft.unlink(missing_ok=True)
    return check_table(root, table, evolve=evolve)


def carried_history(root: Path) -> History | None:
    """The schemas that segments under `root` carry, all of one replay; None when none does."""
    found: list[dict[str, Any]] = []
    for directory in (shard_dir(root, index) for index in shard_indices(root)):
        for place in (directory, *adopted_dirs(directory).values()):
            for stored in stored_segments(place):
                far = stored.tier == "far"
                try:
                    value = read_json(stored.path if far else stored.path / "zarr.json") or {}
                    about = value["extra"]["attributes"] if far else value["attributes"]["replay"]
                except (IntegrityError, KeyError, TypeError):
                    continue
                found += [about] if isinstance(about, dict) else []
    return carried(found)


def check_table(root: Path, table: TableSpec, *, evolve: bool = False) -> str:
    """Return the replay's id. Raises as `open_table`; SchemaError when there is no table at all."""
    history = read_history(root)
    if history.under(table, root, evolve=evolve) is not history:
        with _changing(root):
            history = read_history(root)  # another shard may have been first
            after = history.under(table, root, evolve=evolve)
            if after is not history:  # on the device before any segment of the new schema
                write_json(root / "table.json", after.to_json(FORMAT), durable=True)
                changes = {"schema": after.table.digest[:12], "former": history.table.digest[:12]}
                log.warning("replay goes on under another schema", extra={"root": str(root), **changes})
    return history.replay


@contextlib.contextmanager
def _changing(root: Path) -> Iterator[None]:
    """Alone among those who change table.json. Raises: PreflightError after CHANGE_SECONDS."""
    deadline = time.monotonic() + CHANGE_SECONDS
    with (root / ".table.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise PreflightError(f"{file.name} is held by another process; try again") from error
            time.sleep(0.01)
        yield


def read_table(root: Path) -> tuple[TableSpec, str]:
    """Present schema and id of the replay at `root`. Raises: as `read_history`."""
    history = read_history(root)
    return history.table, history.replay


def read_history(root: Path) -> History:
    """All schemas and the id of the replay at `root`.

    Raises: SchemaError when there is none or it has another format; IntegrityError when it is damaged.
    """
    path = root / "table.json"
    value = read_json(path)
    if value is None:
        raise SchemaError(f"{root} holds no replay table (no table.json); check the replay root")
    if value.get("format") != FORMAT:
        raise SchemaError(
            f"{path} has replay format {value.get('format')!r}, this version reads {FORMAT}; "
            "use the version that wrote it or another replay root"
        )
    try:
        return History.from_json(value)
    except ValueError as error:
        raise _broken(path, str(error)) from error


def take_lock(directory: Path) -> IO[str]:
    """Hold the shard's lock until the returned file is closed or the process dies.

    Raises: PreflightError when another process owns the shard.
    """
    path = directory / "shard.lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise PreflightError(f"cannot open {path} ({error.strerror}); fix the replay root") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = (file.read().split() or ["unknown"])[0]
        file.close()
        raise PreflightError(
            f"replay shard {directory} is owned by process {owner}; one process may own a shard: "
            "stop that one or choose another replay root"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()} {os.urandom(8).hex()}")
    file.flush()
    return file


def lock_owner(directory: Path) -> str:
    """What the last one to take the lock wrote there, another word each time; empty when nobody did."""
    try:
        return (directory / "shard.lock").read_text(errors="replace")
    except FileNotFoundError:
        return ""


def lock_held(directory: Path) -> bool:
    """Whether some process owns the shard, without disturbing it; True where the system does not tell."""
    try:
        inode = (directory / "shard.lock").stat().st_ino
    except FileNotFoundError:
        return False
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:
        return True
    return any(f":{inode} " in line and "FLOCK" in line for line in locks.splitlines())


def sweep(directory: Path) -> None:
    """Empty the scratch directory and remove overlays whose segment is gone. Owner only."""
    scratch = directory / SCRATCH
    if scratch.exists():
        shutil.rmtree(scratch)
    make_dir(scratch)
    kept = {segment.stem for segment in stored_segments(directory)}
    for entry in [*directory.glob("*.overlay.zarr"), *directory.glob("*.kept")]:
        if entry.name.split(".")[0] not in kept:
            shutil.rmtree(entry)


def discard(directory: Path, segment: Path, *, overlay: bool = True) -> list[Path]:
    """Take a published segment and its overlay out of sight; maps that readers hold stay valid.

    Returns what now waits in the scratch directory to be deleted.
    """
    scratch = directory / SCRATCH
    wanted = (segment, overlay_path(segment), kept_path(segment)) if overlay else (segment,)
    present = [path for path in wanted if path.exists()]
    return [path.rename(scratch / f"evicted-{os.urandom(4).hex()}") for path in present]


def remove(paths: Iterable[Path]) -> None:
    """Delete directories and files, whatever of them exists."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
