"""Learner ranks as roles: where each one stands, and what all but rank 0 do.

Rank 0 is `deploy.learner_role`, which alone knows replay, publisher and checkpoints. Launched by the backend
of the run, or by torchrun through `deploy.torchrun`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from deploy import assemble
from deploy.roles import RoleSpec
from system.errors import DeadlineError
from system.metrics import Metrics
from system.specs import EnvSpec

if TYPE_CHECKING:
    from learner.rank_join import RankPlace

END_SECONDS = 240.0
"""Longest time that rank 0 may need for its last update, checkpoint and publication."""


def place_of(spec: RoleSpec) -> RankPlace:
    """Where this rank meets the others, as the driver wrote it into its spec."""
    from learner.rank_join import RankPlace

    config, extra = spec.run_config(), spec.extra
    return RankPlace(
        rank=spec.index,
        ranks=int(extra["ranks"]),
        host=str(extra["host"]),
        port=int(extra["port"]),
        secret=str(extra["secret"]),
        silence=config.learner.rank_timeout,
        join_seconds=config.silent_seconds,
    )


def device_of(spec: RoleSpec) -> str:
    """The device setting of this rank. Raises: ConfigError, PreflightError."""
    from learner.devices import rank_device

    config = spec.run_config()
    shown_all = config.backend == "local" or "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" in os.environ
    return rank_device(config.learner.device, spec.index, config.learner.ranks, own_card=not shown_all)


class RankRole:
    """A learner rank that does what rank 0 says."""

    def __init__(self, spec: RoleSpec) -> None:
        self._spec, self._config = spec, spec.run_config()
        self.metrics = Metrics(self._config.name, "learner", spec.index)
        self._ended = False

    def start(self) -> dict[str, Any]:
        """Meet the other ranks and build the agent. Raises: RankLostError."""
        import torch

        from learner.devices import resolve_device
        from learner.ranks import RankWorker

        spec, config = self._spec, self._config
        torch.set_num_threads(config.learner.threads)
        device = device_of(spec)
        self._worker = RankWorker(place_of(spec), resolve_device(device))
        try:
            self._agent = assemble.agent(config, EnvSpec.from_json(spec.env_spec), device=device)
        except Exception:
            self._worker.close()  # or rank 0 would wait for us
            raise
        return self._status()

    def work(self, seconds: float) -> dict[str, Any]:
        if self._ended:  # rank 0 is done: whoever drives will say stop
            time.sleep(seconds)
        else:
            self._ended = not self._worker.serve(self._agent, seconds)
        self.metrics["learner_ranks"].set(self._config.learner.ranks)
        self.metrics.labels("learner_rank_wait_seconds", rank=str(self._spec.index)).set(self._worker.waited)
        return self._status()

    def stop(self) -> dict[str, Any]:
        """Serve until rank 0 has done its last update. Raises: RankLostError, DeadlineError."""
        deadline = time.monotonic() + END_SECONDS
        while not self._ended:
            self._ended = not self._worker.serve(self._agent, 1.0)
            if not self._ended and time.monotonic() > deadline:
                raise DeadlineError(f"learner rank 0 did not end within {END_SECONDS:.0f} s; see its log")
        self._worker.close()
        return self._status()

    def _status(self) -> dict[str, Any]:
        worker = self._worker
        return {"rank": self._spec.index, "served": worker.updates, "rank_wait_seconds": worker.waited}
