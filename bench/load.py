"""What a benchmark row is, how often to repeat, and how much of the machine others were using meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure. Made by the benches, printed by `bench.__main__`, tabled by `bench.report`."""

    bench: str
    case: str
    metric: str
    value: float  # median of n repetitions
    unit: str
    ratio: float | None = None
    ratio_to: str | None = None  # what was measured in the same run
    n: int = 1
    spread: float = 0.0  # interquartile range over the median
    foreign_load: float = 0.0  # CPU cores that other processes used meanwhile; distrust above 0.2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Repetitions of one measurement with the load they ran under. Made by `repeat`."""

    values: tuple[float, ...]
    foreign_load: float
    cpu_per_wall: float

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        if len(self.values) < 2 or self.median == 0:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / self.median

    def row(self, bench: str, case: str, metric: str, unit: str, **more: Any) -> Row:
        """The row of these samples; `more` overrides value and sets ratio, ratio_to."""
        values: dict[str, Any] = {"value": self.median, **more}
        return Row(
            bench=bench,
            case=case,
            metric=metric,
            unit=unit,
            n=len(self.values),
            spread=self.spread,
            foreign_load=self.foreign_load,
            **values,
        )


class Load:
    """Context that measures wall seconds, our own CPU seconds, and CPU cores used by everyone else.

    Ours are this process and its descendants that still live or were waited for. A descendant
    that ends unseen counts as foreign, so a bench should keep its servers alive inside the context.
    """

    wall = own = foreign = 0.0

    def __enter__(self) -> Load:
        self._begin = (time.perf_counter(), _own_seconds(), _busy_seconds())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall, own, busy = self._begin
        self.wall = time.perf_counter() - wall
        self.own = _own_seconds() - own
        self.foreign = max(0.0, _busy_seconds() - busy - self.own) / self.wall

    @property
    def cpu_per_wall(self) -> float:
        return self.own / self.wall


def repeat(measure: Callable[[], float], *, seconds: float, least: int = 5, most: int = 1000) -> Samples:
    """Call measure() until `seconds` have passed, at least `least` and at most `most` times."""
    values: list[float] = []
    with Load() as load:
        begun = time.perf_counter()
        while len(values) < least or (len(values) < most and time.perf_counter() - begun < seconds):
            values.append(measure())
    return Samples(values=tuple(values), foreign_load=load.foreign, cpu_per_wall=load.cpu_per_wall)


def timed(work: Callable[[], object]) -> float:
    """Seconds that work() takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _own_seconds() -> float:
    me = psutil.Process()
    times = me.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in me.children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.NoSuchProcess:  # ended between listing and asking: now in the sums of who waited for it
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def _busy_seconds() -> float:
    """CPU seconds of all processes since boot; what a hypervisor took away is nobody's."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
