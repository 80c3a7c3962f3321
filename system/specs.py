"""What arrays look like: the shapes, dtypes and kinds that environments, replay and models agree on.

Made by the environment adapter, carried in every handshake, hashed into every replay segment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from system.errors import SchemaError

ObsKind = Literal["image", "vector", "discrete"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Every run, stream, array and metric name matches this in full: no separators, no traversal."""

ROW_COLUMNS: dict[str, str] = {
    "reward": "float32",
    "is_first": "bool",
    "is_last": "bool",
    "is_terminal": "bool",
    "incarnation": "int32",
    "episode": "int32",
    "step": "int32",
    "policy_version": "int64",
}
"""Scalar columns of every row beside obs and action; see `system.experience`."""

ACTION_MASK = "action_mask"
"""Optional bool row column: False where nobody knows the action taken (and so the reward), which both
stand as zeros, as in video. Stored only by tables that hold rows of both kinds. A reader that asks for
it finds True in tables without it, and False in tables without an action column."""

RESERVED = frozenset(ROW_COLUMNS) | {"action", "committed", ACTION_MASK}


def check_name(what: str, name: str) -> str:
    """Return `name`, or raise SchemaError naming what it was for."""
    if not NAME.fullmatch(name):
        raise SchemaError(
            f"{what} {name!r} must match {NAME.pattern} (letters, digits, '.', '_', '-'); rename it"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of a row, without batch or time axes."""

    shape: tuple[int, ...]
    dtype: str  # numpy name: uint8, float32, int32, int64, bool, uint16
    kind: ObsKind = "vector"  # image: uint8 HWC; discrete: int32 with `classes` values per entry
    classes: int = 0
    default: float | None = None
    """What every entry reads as in rows stored before the column existed; none: such rows are refused."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype, "kind": self.kind}
        out |= {"classes": self.classes} if self.classes else {}
        return out | ({"default": self.default} if self.default is not None else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArraySpec:
        return cls(
            shape=tuple(int(n) for n in data["shape"]),
            dtype=str(data["dtype"]),
            kind=data.get("kind", "vector"),
            classes=int(data.get("classes", 0)),
            default=float(data["default"]) if data.get("default") is not None else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpec:
    """The one action array of a row.

    discrete: int32 [K], entry k in [0, classes[k]); K = 1 for an ordinary discrete space.
    continuous: float32 [size], entries in [-1, 1]; the adapter rescales to the environment's bounds.
    """

    kind: Literal["discrete", "continuous"]
    classes: tuple[int, ...] = ()
    size: int = 0

    @property
    def shape(self) -> tuple[int]:
        return (len(self.classes),) if self.kind == "discrete" else (self.size,)

    @property
    def dtype(self) -> str:
        return "int32" if self.kind == "discrete" else "float32"

    @property
    def width(self) -> int:
        """Length of the action as models see it: summed one-hot widths, or the vector's size."""
        return sum(self.classes) if self.kind == "discrete" else self.size

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Uniform random actions [n, *shape]."""
        if self.kind == "discrete":
            return rng.integers(0, np.asarray(self.classes), size=(n, len(self.classes))).astype(np.int32)
        return rng.uniform(-1.0, 1.0, size=(n, self.size)).astype(np.float32)

    def array(self) -> ArraySpec:
        return ArraySpec(shape=self.shape, dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "classes": list(self.classes), "size": self.size}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActionSpec:
        return cls(kind=data["kind"], classes=tuple(int(n) for n in data["classes"]), size=int(data["size"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSpec:
    """What an environment shows and takes; made by its adapter, read by the model and the replay."""

    name: str
    obs: Mapping[str, ArraySpec]
    action: ActionSpec

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "obs": {k: v.to_json() for k, v in sorted(self.obs.items())},
            "action": self.action.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EnvSpec:
        return cls(
            name=str(data["name"]),
            obs={str(k): ArraySpec.from_json(v) for k, v in data["obs"].items()},
            action=ActionSpec.from_json(data["action"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """The schema of one replay table.

    `columns` are immutable once acknowledged; `overlay` columns may be rewritten by row id
    (latent context, priorities). Both hold one entry per row, keyed by array name.
    """

    columns: Mapping[str, ArraySpec]
    overlay: Mapping[str, ArraySpec]

    @classmethod
    def of(cls, env: EnvSpec, overlay: Mapping[str, ArraySpec] | None = None) -> TableSpec:
        """Schema for rows of `env` plus the columns a policy declares.

        Raises: SchemaError when a name is not allowed or collides with a row column.
        """
        return cls.of_rows(env.obs, env.action, overlay)

    @classmethod
    def of_rows(
        cls,
        obs: Mapping[str, ArraySpec],
        action: ActionSpec | None,
        overlay: Mapping[str, ArraySpec] | None = None,
        *,
        action_mask: bool = False,
    ) -> TableSpec:
        """As `of`; tables of action-free rows have no action column, those of both kinds an `action_mask`.

        Raises: SchemaError as `of`.
        """
        overlay = dict(overlay or {})
        for key in (*obs, *overlay):
            check_name("array", key)
            if key in RESERVED:
                raise SchemaError(f"array {key!r} is a name every row already has; rename it in the adapter")
        if clash := set(obs) & set(overlay):
            raise SchemaError(f"policy columns {sorted(clash)} collide with obs keys; rename one side")
        columns = dict(obs)
        if action is not None:
            columns["action"] = action.array()
        columns |= {k: ArraySpec(shape=(), dtype=d) for k, d in ROW_COLUMNS.items()}
        if action_mask:
            columns[ACTION_MASK] = ArraySpec(shape=(), dtype="bool")
        return cls(columns=columns, overlay=overlay)

    @property
    def all(self) -> dict[str, ArraySpec]:
        return {**self.columns, **self.overlay}

    @property
    def row_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.all.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "columns": {k: v.to_json() for k, v in sorted(self.columns.items())},
            "overlay": {k: v.to_json() for k, v in sorted(self.overlay.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TableSpec:
        return cls(
            columns={str(k): ArraySpec.from_json(v) for k, v in data["columns"].items()},
            overlay={str(k): ArraySpec.from_json(v) for k, v in data["overlay"].items()},
        )

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON: equal schemas, equal digests. Defaults change no stored row."""
        plain = TableSpec(
            columns={k: replace(v, default=None) for k, v in self.columns.items()},
            overlay={k: replace(v, default=None) for k, v in self.overlay.items()},
        )
        text = json.dumps(plain.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
