"""A dataset becomes a replay table: its episodes go through the same door as those of actors.

Everything is checked on the way in, into a directory nobody opens; only when the last row is committed and on
the device does it take its name. So a bad file, a full disk or a kill leaves no half table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.datasets.episodes import EXTRAS, About, Episode, EpisodeSource, Tally, checked
from replay.datasets.whole import whole
from replay.shard import ReplayShard
from system.errors import SchemaError
from system.experience import Chunk, StreamId
from system.specs import ACTION_MASK

ABOUT_FILE = "dataset.json"
APPEND_ROWS = 4096
LEAST_CAPACITY = 128  # rows, two segments
APPEND_SECONDS = 600.0
STREAM = StreamId(actor=0, env=0)
"""All episodes of an import follow each other in one stream: no start of a sequence is lost between them."""

Progress = Callable[[Tally], None]


def quiet(_: Tally) -> None:
    """No progress wanted."""


def import_dataset(source: EpisodeSource, root: Path, progress: Progress = quiet) -> Tally:
    """Make `root` a replay table with one shard that holds every episode of `source`.

    Raises: SchemaError, RejectedError or IntegrityError for the first thing wrong in the source, ConfigError
    when `root` exists, PreflightError when the disk refuses; there is no `root` then.
    """
    tally = Tally()
    with whole(root) as draft:
        capacity = max(source.rows, LEAST_CAPACITY)
        shard = ReplayShard(draft, 0, source.about.table, capacity_rows=capacity)
        try:
            for number, episode in enumerate(checked(source.about, source)):
                if tally.rows + len(episode) > capacity:
                    raise SchemaError(
                        f"{episode.name}: the dataset holds more than the {capacity} rows it announced; "
                        "it is "
                        "being written: wait until it is whole"
                    )
                for chunk in chunks(source.about, episode, number):
                    shard.append([chunk], APPEND_SECONDS)
                tally.add(episode)
                progress(tally)
            if not tally.episodes:
                raise SchemaError(f"dataset {source.about.name} has no whole episode; nothing was imported")
            shard.flush()
        finally:
            shard.close()
        write_about(draft, source.about)
    return tally


def chunks(about: About, episode: Episode, number: int) -> Iterator[Chunk]:
    """The rows of an episode as what a shard takes: numbered, what is unknown as zeros, the padding zero."""
    total = len(episode)
    columns: dict[str, NDArray[Any]] = dict(episode.columns)
    if about.action is not None:
        padded = columns["action"].copy()
        padded[-1] = 0  # nobody acts on the last row
        columns["action"] = padded
    columns.setdefault("policy_version", np.zeros(total, EXTRAS["policy_version"]))
    columns["incarnation"] = np.zeros(total, np.int32)
    columns["episode"] = np.full(total, number, np.int32)
    columns["step"] = np.arange(total, dtype=np.int32)
    if ACTION_MASK in columns:
        unknown = ~columns[ACTION_MASK]
        columns["reward"] = np.where(unknown, np.float32(0), columns["reward"])
    for start in range(0, total, APPEND_ROWS):
        rows = {key: values[start : start + APPEND_ROWS] for key, values in columns.items()}
        yield Chunk(stream=STREAM, columns=rows)


def write_about(root: Path, about: About) -> None:
    """Say beside the table what its action column means."""
    layout.write_json(root / ABOUT_FILE, {"format": 1, "about": about.to_json()})


def read_about(root: Path) -> Mapping[str, Any] | None:
    """What `write_about` wrote, None when there is none."""
    value = layout.read_json(root / ABOUT_FILE)
    return None if value is None else value.get("about")
