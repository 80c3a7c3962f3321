"""A nested state split into JSON and arrays, and put together again. Pure; used by `learner.checkpoint`.

Mappings, lists, numbers, text, bool and None go to the JSON tree, arrays leave a reference there.
JSON has neither NaN nor tuples: non-finite floats become {"$float": "nan"}, tuples come back as lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.errors import ConfigError

ARRAY_KEY, FLOAT_KEY = "$array", "$float"
DTYPES = frozenset(
    [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)]
    + ["bool", "float16", "float32", "float64"]
)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
    """Return (JSON tree, arrays by name). Raises: ConfigError naming the path of what cannot be stored."""
    arrays: dict[str, NDArray[np.generic]] = {}
    return _split(dict(state), "", arrays), arrays


def join_state(tree: Any, arrays: Mapping[str, NDArray[np.generic]]) -> Any:
    """The inverse of split_state. Raises: KeyError or ValueError for a tree that split_state did not make."""
    if isinstance(tree, list):
        return [join_state(value, arrays) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if ARRAY_KEY in tree:
        (name,) = tree.values()
        return arrays[name]
    if FLOAT_KEY in tree:
        (text,) = tree.values()
        return float(text)
    return {key: join_state(value, arrays) for key, value in tree.items()}


def _split(value: Any, path: str, arrays: dict[str, NDArray[np.generic]]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {FLOAT_KEY: repr(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise ConfigError(f"state key {path}/{key!r} must be text not starting with '$'; rename it")
        return {key: _split(item, f"{path}/{key}", arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}/{at}", arrays) for at, item in enumerate(value)]
    if isinstance(value, np.ndarray) and value.dtype.name in DTYPES:
        return {ARRAY_KEY: _store(value, path.lstrip("/"), arrays)}
    kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise ConfigError(
        f"state entry {path} is a {kind}, must be a number, text, mapping, list or numeric array"
    )


def _store(array: NDArray[np.generic], path: str, arrays: dict[str, NDArray[np.generic]]) -> str:
    name = path
    while name in arrays or name == "__metadata__":  # {"a/b": ...} beside {"a": {"b": ...}}; a reserved name
        name += "'"
    arrays[name] = array
    return name
