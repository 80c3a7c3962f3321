"""Where datasets meet runs: which source reads a path, which sink writes a format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploy.run_dir import RunDirectory
from replay import layout
from replay.datasets.episodes import EpisodeSource, about_of_json
from replay.datasets.export import SINKS, MakeSink, open_files
from replay.datasets.inference import Casts
from replay.datasets.ingest import read_about
from replay.datasets.table import TableEpisodes
from system.errors import ConfigError, SchemaError
from system.specs import ActionSpec


def parse_casts(casts: tuple[str, ...]) -> dict[str, str]:
    """KEY=DTYPE assignments. Raises: ConfigError for one that is none."""
    found: dict[str, str] = {}
    for text in casts:
        key, _, dtype = text.partition("=")
        try:
            found[key] = str(np.dtype(dtype))
        except TypeError as error:
            raise ConfigError(f"--cast {text!r} must be KEY=DTYPE, e.g. vector=float32") from error
        if not key or not dtype:
            raise ConfigError(f"--cast {text!r} must be KEY=DTYPE, e.g. vector=float32")
    return found


def open_replay(directory: Path, *, cut_open: bool = False) -> TableEpisodes:
    """The episodes of a run directory or of a replay root.

    Raises: SchemaError when there is no replay, or nobody says what its actions mean.
    """
    root = directory if (directory / "table.json").is_file() else RunDirectory(directory).replay
    name, action = _meaning(root)
    return TableEpisodes(root, name, action, cut_open=cut_open)


def _meaning(root: Path) -> tuple[str, ActionSpec | None]:
    """Name and action of the replay at `root`, from the file of its run or of its import."""
    imported = read_about(root)
    if imported is not None:
        about = about_of_json(imported, str(root))
        return about.name, about.action
    run = RunDirectory(root.parent)
    if run.env_file.is_file():
        spec = run.env_spec()
        return spec.name, spec.action
    table, _ = layout.read_table(root)
    stored = table.columns.get("action")
    if stored is None:
        return root.name, None
    if stored.dtype == "float32":
        return root.name, ActionSpec(kind="continuous", size=stored.shape[0])
    raise SchemaError(
        f"{root} stores discrete actions, and neither {run.env_file} nor a dataset.json says how many "
        "there are; "
        "give the run directory, or copy its env_spec.json beside the replay"
    )


def open_dataset(path: Path, casts: Casts, drop: tuple[str, ...]) -> EpisodeSource:
    """The source that reads `path`, by what lies there. Raises: ConfigError when that is no dataset."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give that of a Minari dataset, a Zarr group or npz files")
    source = open_files(path, casts, drop)
    if source is not None:
        return source
    from actors.minari_dataset import MinariEpisodes, is_minari

    if is_minari(path):
        if casts or drop:
            raise ConfigError(
                "--cast and --drop are for npz and zarr; Minari spaces are translated as they are"
            )
        return MinariEpisodes(path)
    if (path / "table.json").is_file():
        raise ConfigError(f"{path} is a replay already; name it in replay.sources as it is")
    raise ConfigError(f"{path} holds no dataset: neither metadata.json (Minari), zarr.json nor npz files")


def sink_maker(form: str, target: Path, name: str | None) -> tuple[MakeSink, int]:
    """What makes the sink of a format, and the least rows of an episode it can hold."""
    if form != "minari":
        return SINKS["npz" if form == "npz" else "zarr"], 1
    from actors.minari_dataset import LEAST_ROWS, MinariSink

    dataset_id = name or (target.name if "-v" in target.name else f"{target.name}-v0")
    return lambda path, source: MinariSink(path, source, dataset_id), LEAST_ROWS
