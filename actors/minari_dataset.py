"""The door to Minari datasets (extra `datasets`): episodes in and out, in Gymnasium's convention and spaces.

Minari keeps T + 1 observations and T actions, rewards, terminations and truncations per episode. Our rows
hold the same: row 0 has obs 0 and reward 0, row t has obs t and reward t - 1, and the last row's action is
padding. So both directions are exact. Minari's JPEG coding of images would not be: exports switch it off. Row
columns beyond that convention travel as infos. Spaces are translated as those of environments are
(`actors.envs.spaces`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.envs.faults import EnvFault
from actors.envs.options import EnvOptions
from actors.envs.spaces import ObsCodec
from replay.datasets.episodes import EXTRAS, About, Episode, EpisodeSource, about_of_json
from system.errors import ConfigError, IntegrityError, RejectedError, SchemaError
from system.specs import ActionSpec, ArraySpec

if TYPE_CHECKING:
    from minari.dataset.minari_storage import MinariStorage

ABOUT_KEY = "dreamfleet"
"""Metadata key under which an export says exactly what its rows were."""
DATA = "data"
METADATA = "metadata.json"
LEAST_ROWS = 2
"""An episode of one row holds no action, and Minari no such episode."""

Array = NDArray[Any]


def is_minari(path: Path) -> bool:
    """Whether `path` is a Minari dataset: its folder, or the `data` folder inside."""
    return (path / DATA / METADATA).is_file() or (path / METADATA).is_file()


def _storage_class() -> type[MinariStorage]:
    try:
        from minari.dataset import minari_storage
    except ImportError as error:
        raise ConfigError(
            f"Minari datasets need the package minari ({error}); pip install 'dreamfleet[datasets]'"
        ) from error
    return minari_storage.MinariStorage


class MinariSink:
    """Writes a Minari dataset into an empty directory (see `replay.datasets.whole`), episode by episode."""

    def __init__(self, directory: Path, source: EpisodeSource, dataset_id: str) -> None:
        """`dataset_id` as Minari wants it: name-v0.

        Raises: SchemaError for action-free episodes; ConfigError for another id or without the package.
        """
        about = source.about
        if about.action is None:
            raise SchemaError(
                f"{about.name} is action-free and Minari has no place for that; export it as npz or zarr"
            )
        storage = _storage_class()
        from minari.dataset.minari_dataset import DATASET_ID_RE

        if not DATASET_ID_RE.fullmatch(dataset_id) or "-v" not in dataset_id:
            raise ConfigError(
                f"Minari dataset id {dataset_id!r} must look like name-v0; rename it with --name"
            )
        self._about, self._action = about, about.action
        self._path = directory / DATA
        self._storage = storage.new(
            self._path,
            observation_space=spaces.Dict({key: space_of(spec) for key, spec in sorted(about.obs.items())}),
            action_space=action_space_of(about.action),
            data_format="hdf5",
            jpeg_encoding=False,  # it would change the pixels
        )
        self._id = dataset_id

    def write(self, episode: Episode) -> None:
        """One more episode, of at least two rows."""
        from minari.data_collector.episode_buffer import EpisodeBuffer

        columns = episode.columns
        terminal, last = columns["is_terminal"][1:], columns["is_last"][1:]  # [T]
        buffer = EpisodeBuffer(
            observations={key: columns[key] for key in sorted(self._about.obs)},  # [T + 1, ...]
            actions=_native_actions(self._action, columns["action"][:-1]),  # type: ignore[arg-type]  # [T, ...]
            rewards=columns["reward"][1:],  # type: ignore[arg-type]  # arrays are written whole
            terminations=terminal,  # type: ignore[arg-type]
            truncations=last & ~terminal,  # type: ignore[arg-type]
            infos={key: columns[key] for key in self._about.extras} or None,
        )
        self._storage.update_episodes([buffer])

    def finish(self) -> None:
        """The metadata that make it a dataset by name."""
        import minari

        self._storage.update_metadata(
            {
                "dataset_id": self._id,
                "minari_version": minari.__version__,
                "algorithm_name": "dreamfleet",
                ABOUT_KEY: json.dumps(self._about.to_json()),
            }
        )


class MinariEpisodes:
    """EpisodeSource over a local Minari dataset."""

    def __init__(self, path: Path) -> None:
        """Raises: IntegrityError for a damaged dataset, ConfigError for spaces rows cannot hold or without
        the package.
        """
        self._path = path / DATA if (path / DATA / METADATA).is_file() else path
        metadata = _metadata(self._path)
        storage = _storage_class()
        try:
            self._storage = storage.read(self._path)
            self._episodes = int(metadata["total_episodes"])
            self.rows = int(metadata["total_steps"]) + self._episodes
        except (KeyError, ValueError, TypeError, AssertionError, OSError) as error:
            raise IntegrityError(
                f"{self._path} is no readable Minari dataset ({error!r}); download it again"
            ) from error
        self._codec: ObsCodec | None = None
        self._action_space = self._storage.action_space
        if ABOUT_KEY in metadata:
            where = f"{self._path / METADATA} key {ABOUT_KEY}"
            self.about = about_of_json(json.loads(str(metadata[ABOUT_KEY])), where)
        else:
            name = str(metadata.get("dataset_id", self._path))
            self._codec = ObsCodec(name, self._storage.observation_space, EnvOptions())
            self.about = About(
                name=name, obs=self._codec.spec, action=action_spec_of(name, self._action_space)
            )

    def __iter__(self) -> Iterator[Episode]:
        for number in range(self._episodes):
            name = f"{self._path} episode {number}"
            try:
                (stored,) = self._storage.get_episodes([number])
            except (KeyError, OSError, ValueError, AssertionError) as error:
                raise IntegrityError(
                    f"{name} cannot be read ({error!r}); the file is cut off or damaged: download it again"
                ) from error
            yield Episode(name=name, columns=self._rows(name, stored))

    def _rows(self, name: str, stored: dict[str, Any]) -> dict[str, Array]:
        steps = len(stored["rewards"])
        ended, cut = (np.asarray(stored[key], np.bool_) for key in ("terminations", "truncations"))
        _check_ends(name, steps, ended, cut)
        rewards = np.asarray(stored["rewards"]).astype(np.float32)  # as environment adapters do
        rows: dict[str, Array] = self._obs(name, stored["observations"], steps + 1)
        assert self.about.action is not None
        action = self._encode_actions(name, stored["actions"], steps)
        zero = np.zeros((1, *action.shape[1:]), action.dtype)
        rows["action"] = np.concatenate([action, zero])  # [T, A] -> [T + 1, A]
        rows["reward"] = np.concatenate([np.zeros(1, np.float32), rewards])
        index = np.arange(steps + 1)
        rows["is_first"], rows["is_last"] = index == 0, index == steps
        rows["is_terminal"] = rows["is_last"] & ended[-1]
        infos = stored.get("infos") or {}
        for key in self.about.extras:
            if key not in infos:
                raise SchemaError(f"{name} lacks the info {key} that its metadata promise; download it again")
            rows[key] = np.asarray(infos[key], EXTRAS[key])
        return rows

    def _obs(self, name: str, observations: Any, rows: int) -> dict[str, Array]:
        if self._codec is None:
            return {key: np.asarray(values) for key, values in observations.items()}
        try:
            return self._codec.encode(observations, rows, copy=False)
        except EnvFault as error:
            raise RejectedError("nonfinite", f"{name}: {error}; mend or remove the episode") from error

    def _encode_actions(self, name: str, actions: Any, steps: int) -> Array:
        """Rows [T, A] of native actions: the inverse of what environment adapters do."""
        space = self._action_space
        native = np.asarray(actions)
        if len(native) != steps:
            raise SchemaError(f"{name} has {len(native)} actions for {steps} rewards; must be equal: mend it")
        flat = native.reshape(steps, -1)
        if isinstance(space, spaces.Discrete):
            return (flat - space.start).astype(np.int32)
        if isinstance(space, spaces.MultiDiscrete):
            return (flat - np.asarray(space.start).reshape(-1)).astype(np.int32)
        if isinstance(space, spaces.MultiBinary):
            return flat.astype(np.int32)
        centre, half = _bounds(space)
        return ((flat.astype(np.float64) - centre) / half).astype(np.float32)


def space_of(spec: ArraySpec) -> spaces.Space[Any]:
    """The Gymnasium space whose samples are exactly the entries of one column."""
    dtype = np.dtype(spec.dtype)
    if spec.kind == "discrete" and spec.classes and spec.shape:
        return spaces.MultiDiscrete(np.full(spec.shape, spec.classes), dtype=np.int32)
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, spec.shape, dtype.type)
    if dtype.kind == "b":
        return spaces.Box(0, 1, spec.shape, np.bool_)  # type: ignore[arg-type]
    limits = np.iinfo(dtype)
    top = spec.classes - 1 if spec.classes else limits.max
    return spaces.Box(0 if spec.classes else limits.min, top, spec.shape, dtype.type)


def action_space_of(spec: ActionSpec) -> spaces.Space[Any]:
    """Discrete for one choice, MultiDiscrete for several, a Box of [-1, 1] for continuous actions."""
    if spec.kind == "continuous":
        return spaces.Box(-1.0, 1.0, (spec.size,), np.float32)
    if len(spec.classes) == 1:
        return spaces.Discrete(spec.classes[0])
    return spaces.MultiDiscrete(np.asarray(spec.classes))


def action_spec_of(name: str, space: spaces.Space[Any]) -> ActionSpec:
    """Our action for a Gymnasium space, as environment adapters see it. Raises: ConfigError."""
    if isinstance(space, spaces.Discrete):
        return ActionSpec(kind="discrete", classes=(int(space.n),))
    if isinstance(space, spaces.MultiDiscrete):
        return ActionSpec(kind="discrete", classes=tuple(int(n) for n in np.asarray(space.nvec).reshape(-1)))
    if isinstance(space, spaces.MultiBinary):
        return ActionSpec(kind="discrete", classes=(2,) * int(np.prod(space.shape)))
    if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == "f":
        centre, half = _bounds(space)
        if not (np.isfinite(centre).all() and (half > 0).all()):
            raise ConfigError(f"{name} has unbounded actions {space}; rows need bounds: rescale the dataset")
        return ActionSpec(kind="continuous", size=len(centre))
    raise ConfigError(
        f"{name} has actions of {space}; supported are Discrete, MultiDiscrete, MultiBinary and float Box"
    )


def _bounds(space: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and half width of a Box, flat [A]."""
    low, high = (np.asarray(end, np.float64).reshape(-1) for end in (space.low, space.high))
    with np.errstate(invalid="ignore"):  # of open ends, which the caller refuses
        return (low + high) / 2, (high - low) / 2


def _native_actions(spec: ActionSpec, rows: Array) -> Array:
    """[T, K] -> [T] for one discrete choice, else as it is."""
    return rows[:, 0].astype(np.int64) if spec.kind == "discrete" and len(spec.classes) == 1 else rows


def _check_ends(name: str, steps: int, ended: Array, cut: Array) -> None:
    """Raises: SchemaError for an empty episode, RejectedError when an end stands before the last step."""
    if not steps or len(ended) != steps or len(cut) != steps:
        raise SchemaError(
            f"{name} has {steps} rewards, {len(ended)} terminations and {len(cut)} truncations; must be "
            "equal and "
            "at least one: remove the episode"
        )
    if (ended | cut)[:-1].any():
        raise RejectedError("flags", f"{name} ends before its last step; cut it there")


def _metadata(path: Path) -> dict[str, Any]:
    where = path / METADATA
    try:
        value = json.loads(where.read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{where} cannot be read ({error}); download the dataset again") from error
    if not isinstance(value, dict) or not {"observation_space", "action_space"} <= value.keys():
        raise IntegrityError(
            f"{where} must name observation_space and action_space (rebuilding the environment would run "
            "foreign "
            "code); write them into the metadata, or download a newer version"
        )
    return value
