"""A policy without weights: uniform actions. Fills the replay before the first weights; is the baseline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from system.experience import Step
from system.interfaces import Mode
from system.seeds import generator
from system.specs import ActionSpec, ArraySpec
from system.weights import NO_VERSION, PolicyVersion, Weights


class RandomPolicy:
    """Draws uniform actions; its extras are zeros for every declared overlay column."""

    def __init__(self, action: ActionSpec, seed: int, columns: Mapping[str, ArraySpec] | None = None) -> None:
        self._action = action
        self._rng = generator(seed, "random_policy")
        self.columns: Mapping[str, ArraySpec] = dict(columns or {})
        self.version: PolicyVersion = NO_VERSION

    def initial(self, num_envs: int) -> None:
        """Nothing is carried."""

    def act(
        self, carry: None, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], None, dict[str, NDArray[np.generic]]]:
        n = len(step)
        extras = {name: np.zeros((n, *spec.shape), spec.dtype) for name, spec in self.columns.items()}
        return self._action.sample(self._rng, n), None, extras

    def load(self, weights: Weights) -> None:
        """Take the version only: there is nothing to load."""
        self.version = weights.version
