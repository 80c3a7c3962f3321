"""Whether rows of one schema can be read under another: pure rules, applied by `replay.evolve`.

A column only the newer schema has must have a default; one only the older has is ignored; a changed dtype or
shape needs a new table (`replay.datasets.migrate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from system.errors import SchemaError
from system.specs import ACTION_MASK, ArraySpec, TableSpec


def obstacles(found: TableSpec, wanted: TableSpec) -> Iterator[tuple[str, str]]:
    """(column, why) for each column that keeps rows of schema `found` from being read as `wanted`."""
    for name, spec in wanted.columns.items():  # overlays are caches: they begin as zeros
        there = found.columns.get(name)
        if there is not None:
            same = (there.shape, there.dtype) == (spec.shape, spec.dtype)
            fits = there.kind == spec.kind and there.classes <= spec.classes
            if not same or not (fits or (not there.classes and not spec.classes)):
                shown = (
                    f"{s.dtype}{list(s.shape)} {s.kind} {s.classes or ''}".strip() for s in (there, spec)
                )
                yield name, "stored as {}, wanted as {}".format(*shown)
        elif not has_default(name, spec, wanted):
            yield name, "not stored, and without a default"


def has_default(name: str, spec: ArraySpec, wanted: TableSpec) -> bool:
    """Besides what says so: the mask itself, and unknown actions where it says that they are unknown."""
    known = spec.default is not None or name == ACTION_MASK
    return known or (name == "action" and ACTION_MASK in wanted.columns)


def masked(table: TableSpec, others: Iterable[TableSpec]) -> TableSpec:
    """`table`, with an action mask when rows of `others` lack actions: what a mixed batch is read as."""
    if all("action" in other.columns and ACTION_MASK not in other.columns for other in others):
        return table
    mask = {ACTION_MASK: ArraySpec(shape=(), dtype="bool")}
    return TableSpec(columns={**table.columns, **mask}, overlay=table.overlay)


def check_readable(where: str | Path, found: TableSpec, wanted: TableSpec, *, own: bool = False) -> None:
    """Raises: SchemaError naming every column in the way, and what to do; `own`: a run's own table."""
    problems = list(obstacles(found, wanted))
    if not problems:
        return
    listed = "; ".join(f"column {name} {why}" for name, why in problems)
    changes: list[str] = []
    absent: list[str] = []
    for name, _ in problems:
        there, here = found.columns.get(name), wanted.columns[name]
        if there is None or there.shape != here.shape:
            absent.append(f"--set replay.defaults.{name}=0")
        if there is not None:
            cast = there.shape == here.shape and there.dtype != here.dtype
            changes.append(f"--cast {name}={here.dtype}" if cast else f"--drop {name}")
    remedies = ["choose another replay root", "run with the settings that made it"]
    if changes:
        command = f"dreamfleet replay migrate {where} NEW {' '.join(changes)}"
        remedies.insert(0, f"make a table that fits with `{command}`")
    if absent:
        settings = " ".join(["--set replay.evolve=true"] * own + absent)
        remedies.insert(0, f"say what older rows read as with `{settings}`")
    raise SchemaError(
        f"replay at {where} has schema {found.digest[:12]} but this run needs {wanted.digest[:12]} "
        f"({listed}); "
        f"{', or '.join(remedies)}"
    )
