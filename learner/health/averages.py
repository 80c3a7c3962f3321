"""Exponential means of named values: short ones for now, long ones for what is usual. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LONG = 20
"""How many short windows a long mean remembers."""


class Averages:
    """Debiased exponential means over about `window` values; values that are not finite are left out."""

    def __init__(self, window: int) -> None:
        assert window >= 1, window
        self._rate = 1.0 / window
        self._sums: dict[str, tuple[float, float]] = {}  # sum of weighted values, sum of weights

    def add(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            return
        total, weight = self._sums.get(name, (0.0, 0.0))
        keep = 1.0 - self._rate
        self._sums[name] = (keep * total + self._rate * value, keep * weight + self._rate)

    def get(self, name: str) -> float | None:
        """The mean so far; None before the first value."""
        if name not in self._sums:
            return None
        total, weight = self._sums[name]
        return total / weight

    def all(self, *names: str) -> tuple[float, ...] | None:
        """The means of all `names`; None while any is missing."""
        values = [self.get(name) for name in names]
        found = tuple(value for value in values if value is not None)
        return found if len(found) == len(names) else None

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._sums if name.startswith(prefix)]

    def state(self) -> dict[str, list[float]]:
        return {name: list(pair) for name, pair in self._sums.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: (float(pair[0]), float(pair[1])) for name, pair in state.items()}
