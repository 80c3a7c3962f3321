"""Learning-health alarms in a run directory: written as events, read back for status and summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deploy.run_dir import RunDirectory

if TYPE_CHECKING:
    from learner.health.alarms import HealthEvent

RAISED, CLEARED = "health alarm", "health alarm cleared"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmHistory:
    """One alarm over a whole run. Made by `alarm_histories`, taken by status and summary."""

    alarm: str
    times: int  # raised
    on: bool  # still raised when the learner last spoke
    first_update: int
    last_update: int  # newest onset
    value: float  # at the newest onset
    limit: float
    detail: str
    cause: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        state = "ALARM" if self.on else "was raised:"
        what = f" ({self.detail})" if self.detail else ""
        often = f", {self.times} times" if self.times > 1 else ""
        return (
            f"{state} {self.alarm} since update {self.last_update}{often}: {self.value:.4g}, limit "
            f"{self.limit:.4g}{what}; {self.cause}; {self.remedy}"
        )


def write_events(run_dir: RunDirectory, events: Iterable[HealthEvent]) -> None:
    """One line per alarm that went on or off."""
    for event in events:
        if event.kind == "raised":
            run_dir.event(RAISED, **event.raised.to_dict())
        else:
            since = event.raised.since_update
            run_dir.event(CLEARED, alarm=event.raised.alarm, since_update=since, update=event.update)


def settle(run_dir: RunDirectory, on: Iterable[str], update: int) -> None:
    """Close what an earlier learner left open and this one, resumed from a checkpoint, knows nothing of."""
    known = set(on)
    for history in alarm_histories(run_dir):
        if history.on and history.alarm not in known:
            run_dir.event(
                CLEARED,
                alarm=history.alarm,
                since_update=history.last_update,
                update=update,
                reason="learner restarted",
            )


def alarm_histories(run_dir: RunDirectory) -> list[AlarmHistory]:
    """Every alarm that the run ever raised, those still on first."""
    found: dict[str, AlarmHistory] = {}
    for event in run_dir.events():
        name = str(event.get("alarm", ""))
        if event.get("event") == RAISED:
            found[name] = _onset(found.get(name), event)
        elif event.get("event") == CLEARED and name in found:
            found[name] = AlarmHistory(**{**found[name].to_dict(), "on": False})
    return sorted(found.values(), key=lambda history: (not history.on, history.alarm))


def _onset(before: AlarmHistory | None, event: Mapping[str, Any]) -> AlarmHistory:
    update = int(event["since_update"])
    return AlarmHistory(
        alarm=str(event["alarm"]),
        times=1 if before is None else before.times + 1,
        on=True,
        first_update=update if before is None else before.first_update,
        last_update=update,
        value=float(event["value"]),
        limit=float(event["limit"]),
        detail=str(event["detail"]),
        cause=str(event["cause"]),
        remedy=str(event["remedy"]),
    )
