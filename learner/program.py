"""One acting step as a `torch.export` program: for runtimes that have neither this package nor its Python.

The program is the plain step of a policy on the CPU, any number of rows at once, random numbers as inputs:
(deter, stoch, action, obs, is_first, uniform, noise, greedy) -> (action, deter, stoch). Used by
`learner.export`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from system.errors import ConfigError
from system.interfaces import Policy
from system.specs import EnvSpec

MAX_ROWS = 64
"""Rows a program takes at once: what the CNN reads in one piece."""
EXAMPLE_ROWS = 3


class Exportable(Protocol):
    """A policy whose step can be written as a program."""

    plain: nn.Module

    def example(self, rows: int) -> dict[str, Any]: ...


def write_program(path: Path, policy: Policy, env: EnvSpec) -> dict[str, Any]:
    """Write the program of a policy; return its description. Raises: ConfigError when the family has none."""
    if not hasattr(policy, "plain"):
        raise ConfigError(f"a {type(policy).__name__} has no program; export it with --weights-only")
    exportable = cast("Exportable", policy)
    inputs = exportable.example(EXAMPLE_ROWS)
    with torch.no_grad():
        program = make_program(exportable.plain, inputs)
        check_program(program, exportable)
    torch.export.save(program, path)
    outputs = exportable.plain(**inputs)
    return {
        "torch": torch.__version__.split("+")[0],
        "rows": [1, MAX_ROWS],
        "inputs": {name: _shapes(value) for name, value in inputs.items()},
        "outputs": [_shapes(value) for value in outputs],
        "decoding": _decoding(env),
    }


def make_program(module: nn.Module, inputs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """`module` over inputs of 1 to MAX_ROWS rows, without what tells where it was made."""
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    shapes = {
        name: {key: {0: rows} for key in value} if isinstance(value, Mapping) else {0: rows}
        for name, value in inputs.items()
    }
    program = torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source files on this machine
    # Example inputs are the one part that would be pickled into the file.
    program._example_inputs = None
    return program


def check_program(program: torch.export.ExportedProgram, policy: Exportable) -> None:
    """Assert that it does what the module does, also for other numbers of rows than it was traced with."""
    called = program.module()
    for rows in (1, EXAMPLE_ROWS + 2):
        inputs = policy.example(rows)
        for ours, theirs in zip(policy.plain(**inputs), called(**inputs), strict=True):
            torch.testing.assert_close(theirs, ours)


def _shapes(value: Tensor | Mapping[str, Tensor]) -> Any:
    """Type and shape behind the rows of an input, by key where there are several."""
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), *value.shape[1:]]
    return {key: _shapes(item) for key, item in value.items()}


def _decoding(env: EnvSpec) -> str:
    """How the environment's action comes from the program's."""
    if env.action.kind == "discrete":
        return f"one-hots of {list(env.action.classes)} side by side: the index of each one is the action"
    return "clip to [-1, 1], then rescale to the bounds of the environment"
