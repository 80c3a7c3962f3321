"""What foreign arrays mean: an `About` from shapes and dtypes, and the few lossless conversions to our rows.

    uint8 [T, H, W, C]      an image
    uint8, bool [T, ...]    a vector, as they are
    float32 [T, ...]        a vector; other floats only with a cast that the caller names
    integer [T, ...]        discrete, int32 with as many classes as the largest value + 1
    action integer [T(, K)] discrete int32 [K];  action float32 [T, A] continuous in [-1, 1]

Integers of any width become int32 when every value fits. A dataset with neither action nor reward is
action-free; only then may its flags be absent too: each file is then one episode that was cut at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.datasets.episodes import EXTRAS, FLAGS, About
from system.errors import SchemaError
from system.specs import ActionSpec, ArraySpec

Casts = Mapping[str, str]  # array name -> numpy dtype the caller allows it to become
Arrays = Mapping[str, NDArray[Any]]
Headers = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """Made by `inferred`."""

    about: About
    rows: int


def inferred(
    name: str,
    files: Iterable[tuple[str, Headers]],
    read: Callable[[str, list[str]], Arrays],
    casts: Casts,
    drop: Collection[str],
) -> Inferred:
    """What the files of one dataset hold, from all headers and the values of integer arrays alone.

    `read` gives arrays of one file by name. Raises: SchemaError naming file, key, rule and remedy.
    """
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    first, rows = "", 0
    top: dict[str, NDArray[np.int64]] = {}
    for file, headers in files:
        kept = {key: header for key, header in headers.items() if key not in drop}
        length = _length(file, kept)
        rows += length
        bare = {key: (shape[1:], dtype) for key, (shape, dtype) in kept.items()}
        if not first:
            first, shapes = file, bare
        elif bare != shapes:
            _raise_differing(file, first, bare, shapes)
        integers = [
            key for key, (_, dtype) in bare.items() if dtype.kind in "iu" and not _is_pixels(bare[key])
        ]
        integers = [key for key in integers if key not in EXTRAS and key not in casts]
        for key, values in read(file, integers).items():
            per_entry = key == "action"
            highest = values.max(axis=0).reshape(-1) if per_entry else values.max().reshape(1)
            known = top.get(key, np.zeros_like(highest, np.int64))
            top[key] = np.maximum(known, highest.astype(np.int64))
    return Inferred(about=_about(name, first, shapes, top, casts), rows=rows)


def fit(where: str, about: About, columns: Arrays, casts: Casts) -> dict[str, NDArray[Any]]:
    """The arrays of one episode as rows of `about`: named casts, lossless integers, flags and reward of a
    clip. What does not fit is left as it is, for `check_episode` to refuse.

    Raises: SchemaError for an integer that int32 cannot hold.
    """
    found: dict[str, NDArray[Any]] = {}
    for key, spec in about.columns.items():
        if key in columns:
            values = columns[key]
            if key in casts:
                values = values.astype(casts[key])
            if key == "action" and values.ndim == 1:
                values = values[:, None]  # [T] -> [T, 1]
            if spec.dtype == "int32" and values.dtype.kind in "iu" and values.dtype != np.int32:
                values = _int32(where, key, values)
            found[key] = values
    if about.action is None and found:
        rows = len(next(iter(found.values())))
        found.setdefault("reward", np.zeros(rows, np.float32))
        steps = np.arange(rows)
        clip = {"is_first": steps == 0, "is_last": steps == rows - 1, "is_terminal": np.zeros(rows, np.bool_)}
        for key, values in clip.items():
            found.setdefault(key, values)
    return found


def _int32(where: str, key: str, values: NDArray[Any]) -> NDArray[Any]:
    limits = np.iinfo(np.int32)
    if len(values) and (int(values.min()) < limits.min or int(values.max()) > limits.max):
        raise SchemaError(
            f"{where}: {key} spans {values.min()}..{values.max()}, which int32 cannot hold; renumber it "
            "from 0"
        )
    return values.astype(np.int32)


def _length(file: str, headers: Headers) -> int:
    if not headers:
        raise SchemaError(f"{file} holds no array; remove the file")
    lengths = {key: shape[0] if shape else None for key, (shape, _) in headers.items()}
    key, length = next(iter(lengths.items()))
    if None in lengths.values() or len(set(lengths.values())) > 1:
        raise SchemaError(
            f"{file} holds arrays of lengths {lengths}, all must have one row per step; fix it, or leave "
            "odd ones "
            "out with --drop KEY"
        )
    if not length:
        raise SchemaError(f"{file}: {key} has no rows, an episode must have at least one; remove the file")
    return length


def _raise_differing(file: str, first: str, found: Headers, expected: Headers) -> None:
    for key in sorted({*found, *expected}):
        here, there = found.get(key), expected.get(key)
        if here != there:
            shown = ["absent" if h is None else f"{h[1]}{['T', *h[0]]}" for h in (here, there)]
            raise SchemaError(
                f"{file}: {key} is {shown[0]}, but {shown[1]} in {first}; all files of a dataset must "
                "agree: fix the "
                f"file, or leave the array out with --drop {key}"
            )


def _is_pixels(header: tuple[tuple[int, ...], np.dtype[Any]]) -> bool:
    return header[1] == np.uint8


def _about(
    name: str, file: str, shapes: Headers, top: Mapping[str, NDArray[np.int64]], casts: Casts
) -> About:
    passive = "action" not in shapes and "reward" not in shapes
    needed = () if passive else ("action", "reward", *FLAGS)
    if missing := [key for key in needed if key not in shapes]:
        raise SchemaError(
            f"{file} lacks {missing}; episodes need action, reward, {', '.join(FLAGS)} (or neither "
            "action nor "
            "reward: action-free); add the arrays"
        )
    fixed = {"action", "reward", *FLAGS, *EXTRAS}
    obs = {
        key: _obs_spec(file, key, shape, np.dtype(casts.get(key, dtype)), top.get(key))
        for key, (shape, dtype) in shapes.items()
        if key not in fixed
    }
    action = None if passive else _action_spec(file, *shapes["action"], top.get("action"), casts)
    return About(name=name, obs=obs, action=action, extras=tuple(k for k in EXTRAS if k in shapes))


def _obs_spec(
    file: str, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], top: NDArray[np.int64] | None
) -> ArraySpec:
    if dtype == np.uint8:
        return ArraySpec(shape=shape, dtype="uint8", kind="image" if len(shape) == 3 else "vector")
    if dtype.kind in "iu":
        classes = int(top[0]) + 1 if top is not None else 0
        return ArraySpec(shape=shape, dtype="int32", kind="discrete", classes=classes)
    if dtype in (np.float32, np.bool_):
        return ArraySpec(shape=shape, dtype=str(dtype))
    raise SchemaError(
        f"{file}: {key} is {dtype}, rows hold float32, int32, uint8 or bool; allow the conversion with "
        f"--cast {key}=float32, or leave it out with --drop {key}"
    )


def _action_spec(
    file: str, shape: tuple[int, ...], dtype: np.dtype[Any], top: NDArray[np.int64] | None, casts: Casts
) -> ActionSpec:
    dtype = np.dtype(casts.get("action", dtype))
    if dtype.kind in "iu" and len(shape) <= 1 and top is not None:
        return ActionSpec(kind="discrete", classes=tuple(int(n) + 1 for n in top))
    if dtype == np.float32 and len(shape) == 1 and shape[0]:
        return ActionSpec(kind="continuous", size=shape[0])
    raise SchemaError(
        f"{file}: action is {dtype}{['T', *shape]}, must be integers [T] or [T, K], or float32 [T, A] in "
        "-1..1; "
        "convert it (--cast action=float32 for other floats)"
    )
