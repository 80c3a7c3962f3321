"""Translates gymnasium spaces and samples into our specs and rows, once, at the edge.

Obs: nested Dict/Tuple become names joined by '.', scalars become [1], float64 becomes float32, frames
become uint8 HWC, integers become int32 counted from 0. Actions: [-1, 1] becomes the declared bounds.
Letters: N environments, n rows of one call, D vector length, A action width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.envs.faults import EnvFault
from actors.envs.options import EnvOptions, Frame
from system.errors import ConfigError
from system.specs import RESERVED, ActionSpec, ArraySpec, check_name

log = logging.getLogger(__name__)

Array = NDArray[Any]
Path = tuple[str | int, ...]
MAX_FRAME_CHANNELS = 16  # frame stacks of 4 RGB images and below; larger leading axes are heights


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of a nested observation. Made by leaves_of, taken by ObsCodec."""

    path: Path
    name: str
    spec: ArraySpec
    raw_shape: tuple[int, ...]
    raw_dtype: np.dtype[Any]
    form: Literal["image", "vector", "discrete"]
    channels_first: bool = False
    offset: int | NDArray[np.int64] = 0  # smallest discrete value
    classes: int | NDArray[np.int64] = 0


class ObsCodec:
    """Turns batched simulator observations into the arrays of a row, checking every one."""

    def __init__(self, env: str, space: spaces.Space[Any], options: EnvOptions) -> None:
        leaves = [leaf for leaf in _leaves(env, space, options) if leaf.name not in options.drop_obs]
        known = {leaf.name for leaf in leaves}
        for option, names in (("as_vector", options.as_vector),):
            if unknown := set(names) - known:
                raise ConfigError(
                    f"env option {option} names {sorted(unknown)}, but {env} shows {sorted(known)}"
                )
        if not leaves:
            raise ConfigError(f"{env} has no observation left; shorten the env option drop_obs")
        if len(known) != len(leaves):
            names = sorted(leaf.name for leaf in leaves)
            raise ConfigError(f"{env} has observation names that collide: {names}; rename them in a wrapper")
        self._leaves = leaves
        self.spec: dict[str, ArraySpec] = {leaf.name: leaf.spec for leaf in leaves}

    def encode(self, obs: Any, n: int, *, copy: bool) -> dict[str, Array]:
        """Return named arrays [n, ...] of a batched observation; `copy` when the source is reused.

        Raises: EnvFault when a shape, dtype or value is not what the space promised.
        """
        return {leaf.name: _encode(leaf, _walk(obs, leaf.path), n, copy) for leaf in self._leaves}

    def encode_list(self, observations: list[Any]) -> dict[str, Array]:
        """Return named arrays [n, ...] of n single observations, e.g. final_obs."""
        n = len(observations)
        out: dict[str, Array] = {}
        for leaf in self._leaves:
            rows = [np.asarray(_walk(obs, leaf.path)) for obs in observations]
            if any(row.shape != leaf.raw_shape for row in rows):
                raise _malformed(leaf, str([row.shape for row in rows]), f"shape {leaf.raw_shape}")
            out[leaf.name] = _encode(leaf, np.stack(rows), n, copy=False)
        return out

    def encode_one(self, obs: Any) -> dict[str, Array]:
        """Return named arrays of one observation, without batch axis. Raises: EnvFault as encode."""
        return {name: rows[0] for name, rows in self.encode_list([obs]).items()}

    def space(self) -> spaces.Dict:
        """The gymnasium space of encoded observations: reading it gives the same spec again."""
        return spaces.Dict({name: _space_of(spec) for name, spec in self.spec.items()})


def _space_of(spec: ArraySpec) -> spaces.Space[Any]:
    if spec.kind == "discrete":
        return spaces.MultiDiscrete(np.full(spec.shape, spec.classes), dtype=np.int32)
    if spec.kind == "image":
        return spaces.Box(0, 255, spec.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, spec.shape, np.float32)


class ActionCodec:
    """Turns rows of our action array into what the simulator takes."""

    def __init__(self, env: str, space: spaces.Space[Any]) -> None:
        self.spec, self._native = _action_of(env, space)

    def native(self, action: Array) -> Array:
        """Return the simulator's actions [n, ...] for checked rows [n, A]."""
        return self._native(action)


def _leaves(env: str, space: spaces.Space[Any], options: EnvOptions) -> Iterator[Leaf]:
    single = not isinstance(space, spaces.Dict | spaces.Tuple)
    for path, sub in _flatten((), space):
        dotted = ".".join(str(part) for part in path)
        if dotted in options.drop_obs:
            continue
        if not isinstance(sub, spaces.Box) and sub.dtype is not None and sub.dtype.kind == "U":
            log.info("text observation dropped", extra={"env": env, "obs": dotted})
            continue
        yield _leaf(env, path, "" if single else dotted, sub, options)


def _flatten(path: Path, space: spaces.Space[Any]) -> Iterator[tuple[Path, Any]]:
    if isinstance(space, spaces.Dict):
        for key, sub in space.spaces.items():
            yield from _flatten((*path, str(key)), sub)
    elif isinstance(space, spaces.Tuple):
        for index, sub in enumerate(space.spaces):
            yield from _flatten((*path, index), sub)
    else:
        yield path, space


def _leaf(env: str, path: Path, dotted: str, space: Any, options: EnvOptions) -> Leaf:
    raw_shape = tuple(int(size) for size in (space.shape or ()))
    raw_dtype = np.dtype(space.dtype)
    forced = (bool(dotted) and dotted in options.as_vector) or (not dotted and bool(options.as_vector))
    offset: int | NDArray[np.int64] = 0
    classes: int | NDArray[np.int64] = 0
    channels_first = False
    if isinstance(space, spaces.Discrete):
        offset, classes = int(space.start), int(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        offset, classes = np.asarray(space.start).reshape(-1), np.asarray(space.nvec).reshape(-1)
    elif isinstance(space, spaces.MultiBinary):
        classes = 2
    elif not isinstance(space, spaces.Box):
        raise ConfigError(
            f"{env} shows {dotted or 'an observation'} as {type(space).__name__}, which has no array form; "
            "name it in the env option drop_obs, or turn it into a Box in a wrapper"
        )
    discrete = not isinstance(space, spaces.Box)
    size = int(np.prod(raw_shape, dtype=np.int64))
    if discrete and not forced:
        form = "discrete"
        spec = ArraySpec(shape=(size,), dtype="int32", kind="discrete", classes=int(np.max(classes)))
    elif raw_dtype == np.uint8 and len(raw_shape) in (2, 3) and not forced:
        form = "image"
        channels_first = len(raw_shape) == 3 and _is_channels_first(raw_shape, options.frame)
        height, width, depth = _frame_shape(raw_shape, channels_first)
        spec = ArraySpec(shape=(height, width, depth), dtype="uint8", kind="image")
    else:
        form = "vector"
        spec = ArraySpec(shape=(size,), dtype="float32")
    return Leaf(
        path=path,
        name=_obs_name(env, dotted, "image" if form == "image" else "vector"),
        spec=spec,
        raw_shape=raw_shape,
        raw_dtype=raw_dtype,
        form=form,
        channels_first=channels_first,
        offset=offset,
        classes=classes,
    )


def _obs_name(env: str, dotted: str, single: str) -> str:
    """A name rows accept: that of the space, with foreign characters replaced and clashes prefixed."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", dotted.replace("/", ".")) or single
    if name in RESERVED or not name[0].isalnum():
        name = f"obs.{name}"
    return check_name(f"observation of {env}", name)


def _is_channels_first(shape: tuple[int, ...], frame: Frame) -> bool:
    if frame != "auto":
        return frame == "chw"
    first, height, last = shape
    return last > 4 and first <= MAX_FRAME_CHANNELS and first < min(height, last)


def _frame_shape(shape: tuple[int, ...], channels_first: bool) -> tuple[int, int, int]:
    if len(shape) == 2:
        return shape[0], shape[1], 1
    return (shape[1], shape[2], shape[0]) if channels_first else (shape[0], shape[1], shape[2])


def _walk(obs: Any, path: Path) -> Any:
    try:
        for part in path:
            obs = obs[part]
    except (KeyError, IndexError, TypeError) as error:
        dotted = ".".join(str(part) for part in path)
        raise EnvFault("malformed", f"observation {dotted!r} is missing ({error!r})") from error
    return obs


def _encode(leaf: Leaf, raw: Any, n: int, copy: bool) -> Array:
    value = np.asarray(raw)
    if value.shape != (n, *leaf.raw_shape):
        raise _malformed(leaf, f"shape {value.shape}", f"shape {(n, *leaf.raw_shape)}")
    if value.dtype != leaf.raw_dtype and not np.can_cast(value.dtype, leaf.raw_dtype, "same_kind"):
        raise _malformed(leaf, f"dtype {value.dtype}", f"dtype {leaf.raw_dtype}")
    if leaf.form == "image":
        if leaf.channels_first:
            value = value.transpose(0, 2, 3, 1)  # [n, H, W, C]
        return np.array(value.reshape(n, *leaf.spec.shape), np.uint8, copy=copy or None, order="C")
    flat = value.reshape(n, -1)  # [n, D]
    if leaf.form == "discrete":
        index = flat.astype(np.int64) - leaf.offset
        if (index < 0).any() or (index >= leaf.classes).any():
            raise _malformed(leaf, f"values {flat.min()}..{flat.max()}", f"classes {leaf.classes}")
        return index.astype(np.int32)
    if flat.dtype == np.float64:
        with np.errstate(over="ignore"):  # an overflow becomes inf and is caught below
            vector = flat.astype(np.float32)
    else:
        vector = flat.astype(np.float32, copy=copy)
    if leaf.raw_dtype.kind == "f" and not np.isfinite(vector).all():
        raise EnvFault(
            "non_finite", f"observation {leaf.name!r} holds NaN, infinity or a value beyond float32"
        )
    return vector


def _malformed(leaf: Leaf, got: str, must: str) -> EnvFault:
    return EnvFault("malformed", f"observation {leaf.name!r} has {got}, must be {must} as its space declares")


def _action_of(env: str, space: spaces.Space[Any]) -> tuple[ActionSpec, Callable[[Array], Array]]:
    if isinstance(space, spaces.Discrete):
        start, dtype = int(space.start), np.dtype(space.dtype)
        spec = ActionSpec(kind="discrete", classes=(int(space.n),))
        return spec, lambda action: (action[:, 0] + start).astype(dtype)  # [n, 1] -> [n]
    if isinstance(space, spaces.MultiDiscrete):
        first, shape, kind = np.asarray(space.start).reshape(-1), space.shape, np.dtype(space.dtype)
        spec = ActionSpec(kind="discrete", classes=tuple(int(k) for k in np.asarray(space.nvec).reshape(-1)))
        return spec, lambda action: (action + first).astype(kind).reshape(-1, *shape)
    if isinstance(space, spaces.MultiBinary):
        bits = space.shape
        spec = ActionSpec(kind="discrete", classes=(2,) * int(np.prod(bits)))
        return spec, lambda action: action.astype(np.int8).reshape(-1, *bits)
    if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == "f":
        return _box_action(env, space)
    raise ConfigError(
        f"{env} takes actions of {space}; supported are Discrete, MultiDiscrete, MultiBinary and float Box: "
        "convert it in a wrapper of your environment"
    )


def _box_action(env: str, space: spaces.Box) -> tuple[ActionSpec, Callable[[Array], Array]]:
    dtype, shape = np.dtype(space.dtype), space.shape
    low = space.low.reshape(-1).astype(np.float64)
    high = space.high.reshape(-1).astype(np.float64)
    # envpool declares "unbounded" as the smallest and largest double, gymnasium as infinities.
    open_ends = ~(np.isfinite(low) & np.isfinite(high) & (high - low < 1e30))
    if open_ends.any():
        log.warning("unbounded action taken as [-1, 1]", extra={"env": env, "entries": int(open_ends.sum())})
        low, high = np.where(open_ends, -1.0, low), np.where(open_ends, 1.0, high)
    centre, half = (high + low) / 2, (high - low) / 2

    def native(action: Array) -> Array:
        scaled = np.clip(action.astype(np.float64), -1.0, 1.0) * half + centre
        return np.clip(scaled, low, high).astype(dtype).reshape(-1, *shape)

    return ActionSpec(kind="continuous", size=len(low)), native


def with_default_drops(options: EnvOptions, names: tuple[str, ...]) -> EnvOptions:
    """Options that also drop `names`, unless the user asked for them as vectors."""
    extra = tuple(name for name in names if name not in options.as_vector)
    return replace(options, drop_obs=(*options.drop_obs, *extra))
