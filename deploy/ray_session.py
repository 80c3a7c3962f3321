"""`deploy.session.Session` through RLlib: what `dreamfleet train --backend ray` drives.

Each step is an `algo.train()`, so the command line and a user of RLlib go the same way.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from deploy.driver import Progress
from deploy.ray_local import prepare_ray
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from system.config import Layers

if TYPE_CHECKING:
    from deploy.evaluate import Summary


class RaySession:
    """The surface of Session: start(), step() until `finished`, finish() or halt(); close() in every case."""

    def __init__(self, config: RunConfig, layers: Layers, *, resume: str = "auto") -> None:
        prepare_ray()
        from deploy.algorithm import Dreamfleet, DreamfleetConfig

        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it advises on packages we don't need
        self._algo = Dreamfleet(config=DreamfleetConfig().resolved(config, layers.origin))
        self._resume = resume
        self.config: RunConfig = self._algo.run_config
        self.run_dir: RunDirectory = self._algo.run_dir

    @property
    def resumed(self) -> bool:
        return self._algo.session.resumed

    @property
    def changes(self) -> list[str]:
        return self._algo.session.changes

    @property
    def finished(self) -> bool:
        return self._algo.session.finished

    def start(self) -> None:
        self._algo.start(self._resume)

    def step(self) -> Progress:
        self._algo.train()
        driver = self._algo.session.driver
        assert driver is not None
        return driver.progress

    def finish(self) -> Summary:
        return self._algo.finish()

    def halt(self) -> None:
        self._algo.halt()

    def close(self) -> None:
        """End everything; what neither halt() nor finish() has stopped ends without a last checkpoint."""
        self._algo.abandon()
        self._algo.stop()
