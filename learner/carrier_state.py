"""Carriers on their way, as parts of a checkpoint: nested dicts of arrays and JSON values, and back.

Used by `learner.batches` for what lies between reader and learner when a checkpoint is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from system.experience import Sequence, SequenceIds, WriteBack


def state_of(carrier: Sequence | WriteBack | SequenceIds) -> dict[str, Any]:
    """The fields of a carrier by name; arrays are not copied."""
    values = {field.name: getattr(carrier, field.name) for field in fields(carrier)}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        assert isinstance(value, SequenceIds), value
        return state_of(value)
    return dict(value) if isinstance(value, Mapping) else value


def sequence_of(state: Mapping[str, Any]) -> Sequence:
    """The batch that `state_of` took apart."""
    return Sequence(**{**state, "ids": SequenceIds(**state["ids"])})


def write_back_of(state: Mapping[str, Any]) -> WriteBack:
    """The write-back that `state_of` took apart."""
    return WriteBack(**{**state, "ids": SequenceIds(**state["ids"])})
