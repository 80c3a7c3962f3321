"""Health beside the learn loop: feeds the monitor, probes the world model, looks for the source of NaN.

Between `learner.loop`, which calls it once per tick, and `monitor`, which judges. Never changes the agent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from learner.health.alarms import ALARMS, HealthEvent, Raised
from learner.health.facts import ModelFacts
from learner.health.monitor import HealthMonitor
from learner.health.nonfinite import nonfinite_source
from learner.health.probe import probe
from learner.health.ratio import RatioBooks
from learner.health.settings import HealthSettings
from learner.interfaces import Tree, WorldModel
from system.experience import Sequence
from system.metrics import Metrics
from system.seeds import child_seed

log = logging.getLogger(__name__)

EXPORT_UPDATES = 10
"""Updates between two settings of the value gauges; alarms are set at once."""


class Watched(Protocol):
    """An agent that can be looked into."""

    @property
    def model(self) -> WorldModel: ...
    def prepare(self, sequence: Sequence) -> tuple[Tree, Tree]: ...
    def weight_peaks(self) -> dict[str, float]: ...  # per module; asked for after a skipped update only


class HealthWatch:
    """Watches one learner: after_update(), after_nonfinite() or while_waiting() once per tick."""

    def __init__(
        self,
        agent: Watched,
        settings: HealthSettings,
        facts: ModelFacts,
        *,
        planned_updates: float | None = None,
        books: Callable[[], RatioBooks | None] = lambda: None,
        seed: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        """`books` tells the train ratio as counted now; None while it does not count yet."""
        self.monitor = HealthMonitor(settings, facts, planned_updates=planned_updates)
        self._agent, self._settings, self._facts = agent, settings, facts
        self._books, self._seed = books, seed
        self._metrics = metrics if metrics is not None else Metrics("", "learner")
        self._skipped = 0  # updates in a row
        self._export_all()

    @property
    def active(self) -> tuple[Raised, ...]:
        """The alarms that are on."""
        return self.monitor.active

    def after_update(
        self, update: int, values: Mapping[str, float], sequence: Sequence
    ) -> tuple[HealthEvent, ...]:
        """Judge applied update number `update`, trained on `sequence`, which must still be valid."""
        if not self._settings.enabled:
            return ()
        self._skipped = 0
        events = self.monitor.after_update(update, values)
        if update % EXPORT_UPDATES == 0:
            self._export_all()
        every = self._settings.probe_updates
        if every and update % every == 0:
            events += self._probe(update, sequence)
        return self._export((*events, *self._judge_ratio(update)))

    def after_nonfinite(self, update: int, values: Mapping[str, float]) -> tuple[HealthEvent, ...]:
        """Name the source of a skipped update; `update`: the last applied one."""
        if not self._settings.enabled:
            return ()
        self._skipped += 1
        source = nonfinite_source(values, self._agent.weight_peaks(), self._facts)
        log.warning("not finite", extra={"source": source, "in_a_row": self._skipped})
        return self._export(self.monitor.after_nonfinite(update, source, self._skipped))

    def while_waiting(self, update: int) -> tuple[HealthEvent, ...]:
        """Judge what can be judged without an update."""
        return self._export(self._judge_ratio(update)) if self._settings.enabled else ()

    def state(self) -> dict[str, Any]:
        return self.monitor.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self.monitor.load(state)
        self._export_all()

    def _judge_ratio(self, update: int) -> list[HealthEvent]:
        books = self._books()
        return [] if books is None else self.monitor.after_rows(update, books)

    def _probe(self, update: int, sequence: Sequence) -> list[HealthEvent]:
        settings, begun = self._settings, time.monotonic()
        result = probe(
            self._agent,
            sequence,
            sequences=settings.probe_sequences,
            context=settings.probe_context,
            horizon=settings.probe_horizon,
            seed=child_seed(self._seed, "probe", update),
        )
        self._metrics["learner_probe_seconds"].observe(time.monotonic() - begun)
        if result is None:
            return []
        for row, ratio in result.by_row.items():
            self._metrics.labels("learner_open_loop_error_ratio", horizon=str(row)).set(ratio)
        return self.monitor.after_probe(update, result.error_ratio)

    def _export(self, events: Iterable[HealthEvent]) -> tuple[HealthEvent, ...]:
        """Log what changed and set the gauges."""
        told = tuple(events)
        for event in told:
            raised = event.raised
            said: dict[str, Any] = {"alarm": raised.alarm, "update": event.update, "detail": raised.detail}
            if event.kind == "raised":
                said |= {"value": raised.value, "limit": raised.limit, "remedy": raised.remedy}
            log.warning("health alarm" if event.kind == "raised" else "health alarm cleared", extra=said)
            self._metrics.labels("learner_health", alarm=raised.alarm).set(event.kind == "raised")
        return told

    def _export_all(self) -> None:
        """Set every gauge, so that a series is there before its first alarm."""
        on = {raised.alarm for raised in self.active}
        for alarm in ALARMS:
            self._metrics.labels("learner_health", alarm=alarm.name).set(alarm.name in on)
        for name, value in self.monitor.values.items():
            self._metrics.labels("learner_health_value", alarm=name).set(value)
