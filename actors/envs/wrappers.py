"""Wrappers around any VectorEnv: containment of faults. Between the adapters and the environment loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from actors.envs.faults import EnvFault, FaultReason, RestartBudget
from system.errors import EnvError, EnvTimeout
from system.experience import Step
from system.interfaces import VectorEnv
from system.seeds import child_seed

log = logging.getLogger(__name__)


class ContainedEnv:
    """Rebuilds a vector environment that broke, within a budget.

    After a rebuild every environment shows an is_first row; actors.staging closes the open episodes.
    A fault before the first good row is not contained: that environment never worked.
    """

    def __init__(self, build: Callable[[], VectorEnv], budget: RestartBudget) -> None:
        self._build = build
        self._budget = budget
        self._env = build()
        self.spec = self._env.spec
        self.num_envs = self._env.num_envs
        self._seed = 0
        self._rebuilds = 0
        self._worked = False

    @property
    def restarts(self) -> Mapping[str, int]:
        """Rebuilds so far by reason."""
        return self._budget.counts

    def start(self, seed: int) -> None:
        self._seed = seed
        self._worked = False
        self._env.start(seed)

    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None:
        try:
            self._env.send(action, env_id)
        except (EnvFault, EnvTimeout) as fault:
            self._rebuild(fault)

    def recv(self, timeout: float) -> Step:
        """The next rows; each rebuild gets `timeout` seconds of its own.

        Raises: EnvError when the restart budget is used up, or before the first good row.
        """
        while True:
            try:
                step = self._env.recv(timeout)
            except (EnvFault, EnvTimeout) as fault:
                if not self._worked:
                    raise EnvError(
                        f"environment {self.spec.name!r} gave no usable first rows: {fault}; "
                        "check it with `dreamfleet env check`"
                    ) from fault
                self._rebuild(fault)
            else:
                self._worked = True
                return step

    def _rebuild(self, fault: EnvError) -> None:
        """Build and start again until it works. Raises: EnvError when the budget is used up."""
        while True:
            reason: FaultReason = fault.reason if isinstance(fault, EnvFault) else "hang"
            try:
                self._budget.spend(reason, str(fault))
            except EnvError as error:
                raise error from fault
            self._env.close()
            self._rebuilds += 1
            try:
                self._env = self._build()
                self._env.start(child_seed(self._seed, "rebuild", self._rebuilds))
            except (EnvFault, EnvTimeout) as again:
                fault = again
            else:
                return

    def render(self, env_id: int) -> NDArray[np.uint8] | None:
        return self._env.render(env_id)

    def close(self) -> None:
        self._env.close()
