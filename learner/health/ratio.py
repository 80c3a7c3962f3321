"""Is the train ratio held? Books of inserted and trained rows over a window of rows, without a clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from learner.health.readings import Reading, above

STEPS = 16
"""Snapshots per window: how finely it slides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioBooks:
    """What the limiter counted. Made by whoever owns the reader, taken by RatioWindow.read."""

    inserted: int
    trained: int
    asked: float  # trained rows per inserted row
    band_rows: int  # inserted rows that either side may be ahead by rule
    owed: float = 0.0  # trained rows that are due; negative: trained ahead


class RatioWindow:
    """Compares what was trained with what was asked for, over at least `rows` inserted rows.

    Within a band of b rows a window of I rows may be off by 2 * b / I by rule (`replay.limiter`), so it is
    widened until that is at most half of `limit`.
    """

    def __init__(self, rows: int, limit: float, margin: float) -> None:
        self._rows, self._limit, self._margin = rows, limit, margin
        self._seen: deque[RatioBooks] = deque()

    def read(self, books: RatioBooks) -> Reading | None:
        """The reading of the newest whole window; None before there is one, and after a new ratio was set."""
        seen = self._seen
        if seen and _breaks(seen[-1], books):
            seen.clear()
        needed = max(float(self._rows), 4.0 * books.band_rows / self._limit)
        if not seen or _span(seen[-1], books) >= needed / STEPS:
            seen.append(books)
        while len(seen) > 1 and _span(seen[1], books) >= needed:
            seen.popleft()
        span = _span(seen[0], books)
        if span < needed:
            return None
        inserted, trained = books.inserted - seen[0].inserted, books.trained - seen[0].trained
        detail = f"{trained} rows trained for {inserted} inserted, {books.asked:g} asked for each"
        error = abs(_unpaid(books.asked * inserted - trained, seen[0].owed)) / (books.asked * span)
        return above(error, self._limit, self._margin, detail)


def _unpaid(missing: float, owed: float) -> float:
    """What no debt explains of `missing` trained rows; negative: too many.

    A learner that resumes from an older checkpoint owes the updates since, and makes up for them.
    """
    low, high = sorted((0.0, -owed))
    return missing - min(max(missing, low), high)


def _span(old: RatioBooks, new: RatioBooks) -> float:
    """Inserted rows between two moments, or those that the training between them asks for, if more."""
    return max(float(new.inserted - old.inserted), (new.trained - old.trained) / new.asked)


def _breaks(old: RatioBooks, new: RatioBooks) -> bool:
    return new.asked != old.asked or new.inserted < old.inserted or new.trained < old.trained
