"""Sends the agent's acting weights to a WeightSink without holding up training.

Versions are (epoch, counter): the counter grows with every publication, the epoch with every resume, so
no actor ever sees a version go back. Between `learner.loop` and `system.params`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from system.errors import DeadlineError, DreamfleetError, InfrastructureError
from system.interfaces import Agent, WeightSink
from system.metrics import Metrics
from system.weights import PolicyVersion, Weights, nonfinite

log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0
"""How often the newest version of the store is compared with ours: a restarted store holds nothing."""
RETRY_SECONDS = 0.5


class Publisher:
    """Publishes every `every_updates` and when told to; of versions that wait, the newest wins.

    A store that is away is tried until it answers, while training goes on. One that refuses a version
    means that another learner publishes: that error is raised in the loop.
    """

    def __init__(
        self,
        agent: Agent,
        sink: WeightSink,
        every_updates: int,
        epoch: int = 1,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        assert every_updates >= 1, every_updates
        assert epoch >= 1, epoch
        self._agent, self._sink, self._every = agent, sink, every_updates
        self._metrics = metrics if metrics is not None else Metrics("", "learner")
        self._version = PolicyVersion(epoch, 0)
        self._updates_since = 0
        self._changed = threading.Condition()
        self._slot: Weights | None = None  # newest version not yet accepted
        self._held: Weights | None = None  # newest version accepted: sent again to a store that lost it
        self._error: Exception | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def version(self) -> PolicyVersion:
        """The newest version handed over for sending; counter 0 before the first."""
        return self._version

    def after_update(self) -> bool:
        """Count an update and publish when it is due. Raises: as publish."""
        self._updates_since += 1
        return self._updates_since >= self._every and self.publish()

    def publish(self) -> bool:
        """Hand a copy of the weights to the sender; False, and nothing sent, when they are not finite.

        Raises: RejectedError when the store refused an earlier version.
        """
        self._raise_if_failed()
        arrays = {name: np.array(array) for name, array in self._agent.weights().items()}
        if broken := nonfinite(arrays):
            log.warning("weights not published", extra={"nonfinite": broken[:3]})
            return False
        self._version = PolicyVersion(self._version.epoch, self._version.counter + 1)
        self._updates_since = 0
        with self._changed:
            # The digest is computed by the sender, off the training path.
            self._slot = Weights(version=self._version, arrays=arrays, digest="")
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
            self._thread.start()
        return True

    def flush(self, timeout: float) -> None:
        """Wait until the newest version was accepted. Raises: DeadlineError, RejectedError."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._slot is None or self._error is not None, timeout)
        self._raise_if_failed()
        if not done:
            raise DeadlineError(
                f"weights {tuple(self._version)} were not accepted within {timeout:g} s; "
                "check that the parameter server runs"
            )

    def stop(self) -> None:
        """End the sender. A version still waiting is dropped: flush() first if it matters."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(60.0)

    def state(self) -> dict[str, Any]:
        return {"epoch": self._version.epoch, "counter": self._version.counter}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint in a new epoch: newer than all that was published since it was saved."""
        epoch = max(self._version.epoch, int(state["epoch"]) + 1)
        self._version = PolicyVersion(epoch, int(state["counter"]))

    def claim(self, timeout: float) -> None:
        """Take an epoch above the one the store holds, so that a learner before us is refused from now on.

        A store that does not answer is taken as empty: it was restarted, or will refuse us later.
        """
        try:
            newest = self._sink.newest(timeout)
        except (DeadlineError, InfrastructureError) as error:
            log.warning("parameter store does not answer", extra={"why": str(error)})
            return
        if newest >= self._version:
            self._version = PolicyVersion(newest.epoch + 1, self._version.counter)

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._changed:
                    self._changed.wait_for(lambda: self._slot is not None or self._stopping, CHECK_SECONDS)
                    pending = self._slot
                if self._stopping:
                    return
                if pending is None:
                    self._restore_if_lost()
                elif not self._send(pending):
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
        except DreamfleetError as error:  # a refusal: the loop must hear of it
            log.error("publishing ended", extra={"why": str(error)})
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _send(self, pending: Weights) -> bool:
        weights = Weights.of(pending.version, pending.arrays)
        begun = time.monotonic()
        try:
            self._sink.publish(weights)
        except (DeadlineError, InfrastructureError) as error:
            log.warning(
                "weights not accepted yet", extra={"version": tuple(pending.version), "why": str(error)}
            )
            return False
        self._held = weights
        self._metrics["learner_policy_version"].set(weights.version.counter)
        log.info(
            "weights published",
            extra={"version": tuple(weights.version), "ms": 1000 * (time.monotonic() - begun)},
        )
        with self._changed:
            if self._slot is pending:
                self._slot = None
            self._changed.notify_all()
        return True

    def _restore_if_lost(self) -> None:
        if self._held is None:
            return
        try:
            if self._sink.newest(CHECK_SECONDS) < self._held.version:
                self._sink.publish(self._held)
                log.info("weights published again", extra={"version": tuple(self._held.version)})
        except (DeadlineError, InfrastructureError) as error:
            log.warning("parameter store does not answer", extra={"why": str(error)})
