"""Streams episodes from a source into a dataset that appears when it is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from replay.datasets.episodes import EpisodeSink, EpisodeSource, Tally
from replay.datasets.flat_zarr import ZarrEpisodes, ZarrSink
from replay.datasets.inference import Casts
from replay.datasets.ingest import Progress, quiet
from replay.datasets.npz import NpzEpisodes, NpzSink
from replay.datasets.npz_chunks import ChunkEpisodes, is_chunked
from replay.datasets.whole import whole
from system.errors import SchemaError

Format = Literal["npz", "zarr"]
MakeSink = Callable[[Path, EpisodeSource], EpisodeSink]

SINKS: dict[Format, MakeSink] = {
    "npz": lambda path, source: NpzSink(path, source.about),
    "zarr": lambda path, source: ZarrSink(path, source.about, source.rows),
}


def export_dataset(
    source: EpisodeSource, path: Path, make_sink: MakeSink, progress: Progress = quiet, *, least_rows: int = 1
) -> Tally:
    """Write every episode of `source` with `least_rows` rows to a new dataset at `path`.

    Raises: ConfigError when `path` exists, SchemaError when there is no whole episode, PreflightError when
    the disk refuses; there is no `path` then.
    """
    tally = Tally()
    with whole(path) as draft:
        sink = make_sink(draft, source)
        for episode in source:
            if len(episode) < least_rows:
                tally.skip("episode too short", len(episode))
                continue
            sink.write(episode)
            tally.add(episode)
            progress(tally)
        if not tally.episodes:
            raise SchemaError(
                f"{source.about.name} has no whole episode to export; wait for one to end, or allow "
                "running ones "
                "with --cut-open"
            )
        sink.finish()
    return tally


def open_files(path: Path, casts: Casts, drop: tuple[str, ...]) -> EpisodeSource | None:
    """The source that reads `path`, None when it is no folder of npz files and no Zarr group."""
    if (path / "zarr.json").is_file() or (path / ".zgroup").is_file():
        return ZarrEpisodes(path, casts=casts, drop=drop)
    if is_chunked(path):
        return ChunkEpisodes(path, casts=casts, drop=drop)
    if any(path.glob("*.npz")):
        return NpzEpisodes(path, casts=casts, drop=drop)
    return None
