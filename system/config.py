"""Strict configuration: layers of YAML and `--set a.b=c` become one frozen pydantic model.

Unknown keys are refused with the nearest known key, every value remembers where it came from, and
nothing below a constructor sees a config object. Used by `deploy.run_config`, and by the families.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from system.errors import ConfigError

MAX_YAML_BYTES = 1 << 20


class StrictConfig(BaseModel):
    """Base of every config model: frozen, unknown keys forbidden, docstrings under fields as help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=False
    )


Model = TypeVar("Model", bound=StrictConfig)


@dataclass(slots=True)
class Layers:
    """Merged settings and, per dotted key, the name of the layer that set it last."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    origin: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, settings: Mapping[str, Any], source: str, lines: Mapping[str, int] | None = None) -> Layers:
        """Lay `settings` over what is there; mappings merge, everything else replaces."""
        self._merge(self.values, settings, source, "", lines or {})
        return self

    def _merge(
        self, into: dict[str, Any], new: Mapping[str, Any], source: str, prefix: str, lines: Mapping[str, int]
    ) -> None:
        for key, value in new.items():
            path = f"{prefix}{key}"
            if isinstance(value, Mapping):
                below = into.get(key)
                if not isinstance(below, dict):
                    below = into[key] = {}
                self._merge(below, typing.cast("Mapping[str, Any]", value), source, f"{path}.", lines)
            else:
                into[key] = value
                line = lines.get(path)
                self.origin[path] = f"{source}:{line}" if line else source


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases (no expansion bombs) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(
                f"{mark.name}:{mark.line + 1}: YAML aliases are not accepted; write the value out"
            )
        return super().compose_node(parent, index)


def _key_lines(node: Any, where: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{where}:{line}: key {name!r} appears twice; keep one of them")
        seen.add(name)
        yield f"{prefix}{name}", line
        yield from _key_lines(value, where, f"{prefix}{name}.")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read one mapping and the line of each dotted key.

    Raises: ConfigError naming file and line for anything that is not a plain, small mapping.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror}); check the path and its permissions"
        ) from error
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{path} has {len(raw)} bytes, must be <= {MAX_YAML_BYTES}; a recipe is a short file"
        )
    try:
        loader = _StrictLoader(raw.decode("utf-8-sig"))
        loader.name = str(path)
        node = loader.get_single_node()
        lines = dict(_key_lines(node, str(path)))
        values = {} if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, holds a {type(values).__name__}")
    return typing.cast("dict[str, Any]", values), lines


def parse_assignment(text: str) -> dict[str, Any]:
    """Turn 'a.b=c' into {'a': {'b': c}}, the value read as YAML. Raises: ConfigError."""
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"--set {text!r} must look like section.key=value, e.g. --set actors.count=4")
    try:
        parsed = _StrictLoader(value).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, say 2024-13-45
        raise ConfigError(f"--set {text!r}: the value is not valid YAML ({error})") from error
    out: Any = parsed
    for part in reversed(parts):
        out = {part: out}
    return typing.cast("dict[str, Any]", out)


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((m for m in map(_submodel, typing.get_args(annotation)) if m), None)
    return None


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        if below := _submodel(info.annotation):
            yield from _known_keys(below, f"{prefix}{name}.")


def _unknown_keys(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        info = model.model_fields.get(name)
        if info is None:
            yield f"{prefix}{name}"
        elif (below := _submodel(info.annotation)) and isinstance(value, Mapping):
            yield from _unknown_keys(below, typing.cast("Mapping[str, Any]", value), f"{prefix}{name}.")


def build(model: type[Model], layers: Layers, prefix: str = "") -> Model:
    """Validate merged layers into `model`.

    Raises: ConfigError naming each bad key, its value, its origin, and the nearest known key.
    """
    known = list(_known_keys(model))
    problems: list[str] = []
    for key in _unknown_keys(model, layers.values):
        leaf = {path.rsplit(".", 1)[-1]: path for path in known}
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaf), n=1)]
        hint = f"; did you mean {prefix}{near[0]!s}?" if near else f"; known: {', '.join(model.model_fields)}"
        problems.append(f"unknown key {prefix}{key} (from {origin_of(layers, prefix + key)}){hint}")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return model.model_validate(layers.values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path = ".".join(str(p) for p in item["loc"])
            shown = "" if isinstance(item["input"], Mapping) else f" = {item['input']!r}"
            where = origin_of(layers, prefix + path)
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{prefix}{path}{shown} (from {where}): {message}" if path else message)
        raise ConfigError("\n".join(problems)) from error


def origin_of(layers: Layers, key: str) -> str:
    """Which layer set `key`, or one of the keys below it."""
    if key in layers.origin:
        return layers.origin[key]
    return next((o for k, o in layers.origin.items() if k.startswith(f"{key}.")), "default")


def flatten(config: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted leaf keys of a config, JSON-able values."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(typing.cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def dump_with_origin(config: BaseModel, layers: Layers) -> str:
    """YAML of the resolved config, each value followed by where it came from."""
    lines: list[str] = []

    def walk(values: Mapping[str, Any], prefix: str, depth: int) -> None:
        for key, value in values.items():
            path, pad = f"{prefix}{key}", "  " * depth
            if isinstance(value, Mapping) and value:
                lines.append(f"{pad}{key}:")
                walk(typing.cast("Mapping[str, Any]", value), f"{path}.", depth + 1)
            else:
                lines.append(f"{pad}{key}: {json.dumps(value)}  # {origin_of(layers, path)}")

    walk(config.model_dump(mode="json"), "", 0)
    return "\n".join(lines) + "\n"
