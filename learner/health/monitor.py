"""The health monitor: floats of every update in, alarms that go on and off with patience out. No torch.

`learner.health.watch` feeds it beside the learn loop; `readings` holds the rules, `alarms` the words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from learner.health.alarms import ALARMS, BY_NAME, HealthEvent, Raised
from learner.health.averages import LONG, Averages
from learner.health.facts import ModelFacts
from learner.health.ratio import RatioBooks, RatioWindow
from learner.health.readings import RULES, TINY, Look, Reading, above
from learner.health.settings import HealthSettings

AT_ONCE = frozenset({"learning_rate"})
"""Judged from the first update on, and raised without patience: it follows from settings, not from luck."""
SLOW = frozenset({"entropy_maximum", "return_flat"})
RATIO_PATIENCE = 10
"""Books are read while others write them; a window of rows needs no more patience than that."""


class HealthMonitor:
    """Judges one learner. Every method returns the alarms that went on or off with it."""

    def __init__(
        self, settings: HealthSettings, facts: ModelFacts, *, planned_updates: float | None = None
    ) -> None:
        """`planned_updates`: how many the run is meant to have in all, if known."""
        self.settings, self.facts, self.planned_updates = settings, facts, planned_updates
        self.values: dict[str, float] = {}
        """Newest judged value of every alarm."""
        self._short, self._long = Averages(settings.window), Averages(LONG * settings.window)
        self._probes = Averages(3)
        self._best = math.inf  # least open-loop error ratio so far
        self._ratio = RatioWindow(settings.ratio_rows, settings.ratio_error, settings.margin)
        self._raised: dict[str, Raised] = {}
        self._streaks: dict[str, int] = {}  # looks in a row that speak for a change
        self._updates = 0  # judged since the start
        self._update = 0
        self._lr: float | None = None
        self._lr_still = 0

    @property
    def active(self) -> tuple[Raised, ...]:
        """The alarms that are on, in the order of the table."""
        return tuple(self._raised[alarm.name] for alarm in ALARMS if alarm.name in self._raised)

    def after_update(self, update: int, values: Mapping[str, float]) -> list[HealthEvent]:
        """Judge one applied update. `update`: its number over all resumes; `values`: metrics by name."""
        self._update, self._updates = update, self._updates + 1
        self._take(values)
        look = Look(
            update=update,
            short=self._short,
            long=self._long,
            facts=self.facts,
            settings=self.settings,
            planned_updates=self.planned_updates,
            lr=self._lr,
            lr_still=self._lr_still,
        )
        events: list[HealthEvent] = []
        quiet = self.settings.quiet_updates
        warmup = min(self.facts.warmup, self.settings.warmup_updates)
        calm = self._updates > quiet and update > warmup + quiet
        for name, rule in RULES.items():
            if name in AT_ONCE or calm:
                events += self._judge(name, rule(look), self._patience(name))
        finite = Reading(value=0.0, limit=0.0, broken=False, healed=True)
        return events + self._judge("nonfinite", finite, self.settings.patience)

    def after_nonfinite(self, update: int, source: str, skipped: int) -> list[HealthEvent]:
        """Take a skipped update, whose first non-finite number is at `source`; the alarm goes on at once.

        `skipped`: updates in a row.
        """
        self._update = update
        reading = Reading(value=float(skipped), limit=0.0, broken=True, healed=False, detail=source)
        return self._judge("nonfinite", reading, 1)

    def after_rows(self, update: int, books: RatioBooks) -> list[HealthEvent]:
        """Judge the train ratio. Call it also while no update is possible."""
        self._update = update
        return self._judge("ratio_drift", self._ratio.read(books), RATIO_PATIENCE)

    def after_probe(self, update: int, error_ratio: float) -> list[HealthEvent]:
        """Judge the world model: open-loop error over that of copying the last seen row, of one probe."""
        self._update = update
        self._probes.add("ratio", max(error_ratio, TINY))
        now = self._probes.get("ratio")
        if now is None or not math.isfinite(error_ratio):
            return []
        self._best = min(self._best, now)
        # A model that beats copying is never called broken; one that never did is, once it had its time.
        known = self._best < 1.0
        limit = max(1.0, self.settings.drift_growth * self._best) if known else 1.0
        detail = f"best so far {self._best:.3g}"
        reading = above(now, limit, self.settings.margin, detail)
        if not known and update <= self.settings.drift_updates:
            reading = Reading(value=now, limit=limit, broken=False, healed=False, detail=detail)
        return self._judge("imagination_drift", reading, self.settings.probe_patience)

    def state(self) -> dict[str, Any]:
        """What a resumed learner goes on with: usual values and alarms that are on."""
        return {
            "short": self._short.state(),
            "long": self._long.state(),
            "probes": self._probes.state(),
            "best": self._best if math.isfinite(self._best) else None,
            "raised": {name: raised.to_dict() for name, raised in self._raised.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; alarms this version does not know are dropped."""
        self._short.load(state["short"])
        self._long.load(state["long"])
        self._probes.load(state["probes"])
        self._best = math.inf if state["best"] is None else float(state["best"])
        known: Iterable[tuple[str, Any]] = ((n, r) for n, r in state["raised"].items() if n in BY_NAME)
        self._raised = {name: Raised(**raised) for name, raised in known}

    # ---- inside -----------------------------------------------------------------------------------

    def _take(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._short.add(name, value)
            if name.startswith("grad_norm") and math.isfinite(value):
                size = math.log10(max(value, TINY))
                self._short.add(f"log {name}", size)
                self._long.add(name, size)
        if "replayed/value" in values:
            self._long.add("replayed/value", values["replayed/value"])
        if math.isfinite(lr := values.get("lr", math.nan)):
            grown = self._lr is None or lr > self._lr
            self._lr, self._lr_still = lr, 0 if grown else self._lr_still + 1

    def _patience(self, name: str) -> int:
        if name in AT_ONCE and name not in self._raised:
            return 1
        return self.settings.long_patience if name in SLOW else self.settings.patience

    def _judge(self, name: str, reading: Reading | None, patience: int) -> list[HealthEvent]:
        """Count looks in a row that speak for a change; change after `patience` of them."""
        if reading is None:
            self._streaks[name] = 0
            return []
        self.values[name] = reading.value
        on = name in self._raised
        self._streaks[name] = (
            self._streaks.get(name, 0) + 1 if (reading.healed if on else reading.broken) else 0
        )
        if self._streaks[name] < patience:
            return []
        self._streaks[name] = 0
        return [self._clear(name) if on else self._raise(name, reading)]

    def _raise(self, name: str, reading: Reading) -> HealthEvent:
        alarm = BY_NAME[name]
        raised = self._raised[name] = Raised(
            alarm=name,
            since_update=self._update,
            value=reading.value,
            limit=reading.limit,
            detail=reading.detail,
            cause=alarm.cause,
            remedy=alarm.remedy,
        )
        return HealthEvent(kind="raised", update=self._update, raised=raised)

    def _clear(self, name: str) -> HealthEvent:
        return HealthEvent(kind="cleared", update=self._update, raised=self._raised.pop(name))
