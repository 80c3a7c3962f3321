"""What every dataset format speaks: whole episodes in replay's row convention, and what they look like.

Row t of an episode holds obs_t, the reward and flags received *on arriving* at obs_t, and the action chosen
there (see `system.experience`). Formats of other conventions convert at their own edge. Sources yield one
episode at a time, so whoever streams them holds one episode in memory. Letters: T rows, E episodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from system.errors import IntegrityError, RejectedError, SchemaError
from system.experience import Columns
from system.specs import ACTION_MASK, RESERVED, ROW_COLUMNS, ActionSpec, ArraySpec, TableSpec, check_name

FLAGS = ("is_first", "is_last", "is_terminal")
EXTRAS = {"policy_version": "int64", ACTION_MASK: "bool"}
"""Row columns that a dataset may carry beside obs, action, reward and flags."""
IDENTITY = ("incarnation", "episode", "step")
"""Row columns that say where a row was made; an import numbers its rows anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One whole episode. Made by an EpisodeSource, taken by an EpisodeSink and by `ingest`."""

    name: str  # where it comes from, for messages: a file, or a stream and its numbers
    columns: Columns  # the names of About.columns, each [T, ...]

    def __len__(self) -> int:
        return len(self.columns["is_last"])

    @property
    def nbytes(self) -> int:
        return sum(int(values.nbytes) for values in self.columns.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What all episodes of one dataset look like. Without an action they are action-free (video):
    the reward is unknown too, stands as 0, and the rows count as action_mask 0.
    """

    name: str  # environment or origin
    obs: Mapping[str, ArraySpec]
    action: ActionSpec | None
    extras: tuple[str, ...] = ()  # of EXTRAS

    def __post_init__(self) -> None:
        for key in self.obs:
            check_name(f"observation of dataset {self.name}", key)
            if key in RESERVED:
                raise SchemaError(
                    f"observation {key!r} of dataset {self.name} is a name every row already has; rename it, "
                    f"or leave it out with --drop {key}"
                )
        if not self.obs:
            raise SchemaError(f"dataset {self.name} has no observation; keep at least one array per row")
        if unknown := sorted(set(self.extras) - EXTRAS.keys()):
            raise SchemaError(f"dataset {self.name} has row columns {unknown}, known are {sorted(EXTRAS)}")

    @property
    def columns(self) -> dict[str, ArraySpec]:
        """Every array of an episode by name, without the time axis."""
        found = dict(self.obs)
        if self.action is not None:
            found["action"] = self.action.array()
        scalars = {"reward": "float32"} | dict.fromkeys(FLAGS, "bool") | {k: EXTRAS[k] for k in self.extras}
        return found | {name: ArraySpec(shape=(), dtype=dtype) for name, dtype in scalars.items()}

    @property
    def table(self) -> TableSpec:
        """The schema these episodes are stored under; action-free tables have no action column."""
        return TableSpec.of_rows(self.obs, self.action, action_mask=ACTION_MASK in self.extras)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "obs": {k: v.to_json() for k, v in sorted(self.obs.items())},
            "action": self.action.to_json() if self.action is not None else None,
            "extras": list(self.extras),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> About:
        action = data["action"]
        return cls(
            name=str(data["name"]),
            obs={str(k): ArraySpec.from_json(v) for k, v in data["obs"].items()},
            action=ActionSpec.from_json(action) if action is not None else None,
            extras=tuple(str(name) for name in data.get("extras", ())),
        )


def about_of_json(data: Any, where: str) -> About:
    """As About.from_json. Raises: IntegrityError when that is not what `where` holds."""
    try:
        return About.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"{where} does not describe a dataset ({error!r}); restore it from a copy, or export again"
        ) from error


def about_table(name: str, table: TableSpec, action: ActionSpec | None) -> About:
    """What a table's episodes look like; `action` says what its action column means.

    Raises: SchemaError when the column has another shape or dtype than `action`.
    """
    stored = table.columns.get("action")
    if (stored is None) != (action is None) or (action is not None and action.array() != stored):
        raise SchemaError(
            f"replay {name} stores actions as {stored}, its environment takes {action}; give the "
            "env_spec.json "
            "of the run that made it"
        )
    fixed = {*ROW_COLUMNS, "action", ACTION_MASK}
    return About(
        name=name,
        obs={key: spec for key, spec in table.columns.items() if key not in fixed},
        action=action,
        extras=tuple(key for key in EXTRAS if key in table.columns),
    )


class EpisodeSource(Protocol):
    """A dataset to read; iterating again begins anew."""

    about: About

    @property
    def rows(self) -> int:
        """At least the number of rows it will yield."""
        ...

    def __iter__(self) -> Iterator[Episode]: ...


class EpisodeSink(Protocol):
    """A dataset being written. `finish` completes it; without it nothing may look whole."""

    def write(self, episode: Episode) -> None: ...
    def finish(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Tally:
    """What went through so far. Made by whoever streams episodes, shown as progress and report."""

    episodes: int = 0
    rows: int = 0
    nbytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict[str, int])  # rows left out, by reason

    def add(self, episode: Episode) -> None:
        self.episodes += 1
        self.rows += len(episode)
        self.nbytes += episode.nbytes

    def skip(self, why: str, rows: int) -> None:
        if rows:
            self.skipped[why] = self.skipped.get(why, 0) + rows


def checked(about: About, episodes: Iterable[Episode]) -> Iterator[Episode]:
    """The episodes, each after `check_episode`."""
    for episode in episodes:
        check_episode(about, episode)
        yield episode


def check_episode(about: About, episode: Episode) -> None:
    """Refuse an episode that is not what `about` says, or not in the row convention.

    Raises: SchemaError for keys, dtypes and shapes; RejectedError for what the arrays hold.
    """
    columns, specs = episode.columns, about.columns
    if columns.keys() != specs.keys():
        missing, extra = sorted(specs.keys() - columns.keys()), sorted(columns.keys() - specs.keys())
        raise SchemaError(
            f"{episode.name} lacks {missing} and has unknown {extra}; every episode of a dataset must "
            "have the "
            "same keys: add them, or leave unknown ones out with --drop"
        )
    is_last = columns["is_last"]
    rows = is_last.shape[0] if is_last.ndim else 0
    if rows == 0:
        raise SchemaError(f"{episode.name} is an empty episode; remove it")
    for key, spec in specs.items():
        _check_array(episode.name, key, spec, columns[key], rows)
    _check_flags(episode.name, columns)
    if about.action is not None:
        _check_action(episode.name, about.action, columns["action"])


def _check_array(name: str, key: str, spec: ArraySpec, values: NDArray[Any], rows: int) -> None:
    if values.dtype != spec.dtype or values.shape != (rows, *spec.shape):
        raise SchemaError(
            f"{name}: {key} is {values.dtype}{list(values.shape)}, must be "
            f"{spec.dtype}{[rows, *spec.shape]} as "
            f"in the rest of the dataset; fix the file, cast with --cast {key}={spec.dtype} or --drop {key}"
        )
    kind = values.dtype.kind
    if kind == "f" and not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values.reshape(rows, -1)).all(axis=1))[0])
        raise RejectedError(
            "nonfinite", f"{name}: {key} holds NaN or infinity in row {row}; mend or remove it"
        )
    if kind == "b":
        top = int(np.max(values.view(np.uint8)))
        if top > 1:
            raise RejectedError("range", f"{name}: {key} holds byte {top}, a bool must be 0 or 1; rewrite it")
    if spec.kind == "discrete" and spec.classes:
        low, high = int(np.min(values)), int(np.max(values))
        if low < 0 or high >= spec.classes:
            raise RejectedError(
                "range", f"{name}: {key} spans {low}..{high}, must stay within 0..{spec.classes - 1}; fix it"
            )


def _check_flags(name: str, columns: Mapping[str, NDArray[Any]]) -> None:
    first, last, terminal = (columns[key] for key in FLAGS)
    if not first[0] or first[1:].any():
        raise RejectedError("flags", f"{name}: is_first must be true in row 0 and nowhere else; cut it there")
    if not last[-1] or last[:-1].any():
        raise RejectedError(
            "flags",
            f"{name}: is_last must be true in its last row, {len(last) - 1}, and nowhere else; cut it there",
        )
    if terminal[:-1].any():
        raise RejectedError(
            "flags", f"{name}: is_terminal before the last row; a terminal row ends the episode"
        )
    if float(columns["reward"][0]) != 0.0:
        raise RejectedError(
            "flags",
            f"{name}: reward of row 0 is {float(columns['reward'][0]):g}, must be 0: row t holds the reward "
            "received on arriving at obs t; shift the rewards by one row",
        )


def _check_action(name: str, spec: ActionSpec, action: NDArray[Any]) -> None:
    """`action` is [T, K] or [T, A]."""
    low, high = action.min(axis=0), action.max(axis=0)
    if spec.kind == "discrete":
        if (low < 0).any() or (high >= np.asarray(spec.classes)).any():
            raise RejectedError(
                "range",
                f"{name}: action spans {low.tolist()}..{high.tolist()}, classes are "
                f"{list(spec.classes)}; count "
                "from 0",
            )
    elif (low < -1.0).any() or (high > 1.0).any():
        raise RejectedError(
            "range",
            f"{name}: action spans {low.min():g}..{high.max():g}, must stay within -1..1; rescale it by the "
            "environment's bounds",
        )
