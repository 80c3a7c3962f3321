"""Keeps training and collecting in step: pure bookkeeping, no clocks, no threads.

With N rows inserted and M rows trained since the origin of the ledger,

    error = train_ratio * (N - prefill_rows) - M                       (in trained rows)
    training  waits while  error - rows < -train_ratio * band_rows
    inserting waits while  error        >  train_ratio * band_rows

so both sides are bounded: collectors may be band_rows ahead of the learner, and behind it. Both
cannot wait at once when 2 * band_rows - 1 >= rows / train_ratio.

How exact this is: between two moments with I rows inserted and M trained,
M = train_ratio * I - (error then - error now), so that

    | M / I - train_ratio | / train_ratio  <=  2 * band_rows / I

whatever happened in between. One update alone is rows / train_ratio inserted rows, so no rule keeps
every window closer than that. A wide band costs exactness, a narrow one makes bursts of appends wait
for updates. A paced limiter takes what arrives in SLACK_SECONDS, at least half an update and at most
tolerance_rows: in 60 s of steady traffic 2 * 0.15 / 60 = 0.5 %, or one update if that is more.

`replay.governor` asks and tells; the shards only ever see their part of `insert_budget`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from system.errors import ConfigError

SLACK_SECONDS = 0.15
"""How long each side goes on at the usual rate while the other does nothing, when the band is paced."""


class RateLimiter:
    """Ledger of inserted and trained rows and the band between them."""

    def __init__(
        self,
        train_ratio: float,
        prefill_rows: int,
        tolerance_rows: int,
        min_rows: int,
        *,
        paced: bool = False,
    ) -> None:
        """See the module for the band; `min_rows` live rows are needed before any training.

        A paced limiter fits the band to the traffic it is told of by `pace`, within tolerance_rows.

        Raises: ConfigError for values that would deadlock.
        """
        if not (math.isfinite(train_ratio) and train_ratio > 0):
            raise ConfigError(f"train_ratio ({train_ratio}) must be > 0 and finite; set it, e.g. 32")
        if prefill_rows < 0 or min_rows < 1:
            raise ConfigError(f"prefill_rows ({prefill_rows}) must be >= 0 and min_rows ({min_rows}) >= 1")
        if tolerance_rows < 1:
            raise ConfigError(f"tolerance_rows ({tolerance_rows}) must be >= 1 or nobody can move; raise it")
        if min_rows > prefill_rows + tolerance_rows:
            raise ConfigError(
                f"min_rows ({min_rows}) must be <= prefill_rows ({prefill_rows}) + tolerance_rows "
                f"({tolerance_rows}): collecting would stop before training may begin; raise prefill_rows"
            )
        self.train_ratio = float(train_ratio)
        self.prefill_rows = prefill_rows
        self.tolerance_rows = tolerance_rows
        self.min_rows = min_rows
        self.paced = paced
        self._update_rows = 0
        self._rate = 0.0  # inserted rows per second
        self._asked: tuple[float | None, int | None] | None = None
        self.inserted = 0
        self.live = 0
        self.starts = 0
        self.trained = 0
        self._origin_inserted = 0.0
        self._origin_trained = 0
        self._origin_owed = 0.0

    def check_update(self, rows: int) -> None:
        """Raises: ConfigError when updates of `rows` trained rows could leave both sides waiting."""
        needed = _narrowest(rows, self.train_ratio)
        if self.tolerance_rows < needed:
            raise ConfigError(
                f"tolerance_rows ({self.tolerance_rows}) must satisfy 2 * tolerance_rows - 1 >= batch rows / "
                f"train_ratio ({rows} / {self.train_ratio:g}), or learner and actors would wait for each "
                f"other; raise tolerance_rows to {needed} or more"
            )
        self._update_rows = max(self._update_rows, rows)

    @property
    def band_rows(self) -> int:
        """Inserted rows that either side may be ahead now."""
        if not self.paced:
            return self.tolerance_rows
        least = _narrowest(self._update_rows, self.train_ratio)
        return min(self.tolerance_rows, max(least, math.ceil(self._rate * SLACK_SECONDS)))

    @property
    def ahead_rows(self) -> float:
        """Inserted rows that collecting is ahead of training; negative: training is ahead."""
        return self.error / self.train_ratio

    @property
    def error(self) -> float:
        """Trained rows owed (positive: train) or overdrawn (negative: collect)."""
        since = self.inserted - self._origin_inserted - self.prefill_rows
        return self.train_ratio * since - (self.trained - self._origin_trained)

    @property
    def held_ratio(self) -> float:
        """Trained rows per inserted row since the prefill or the newest change of the ratio; 0 before."""
        since = self.inserted - self._origin_inserted - self.prefill_rows - self._origin_owed
        return (self.trained - self._origin_trained) / since if since > 0 else 0.0

    @property
    def prefilled(self) -> bool:
        debt = min(self._origin_owed, 0.0)  # a ledger restarted while training was ahead had its prefill
        return self.inserted - self._origin_inserted >= self.prefill_rows + debt

    def observe(self, inserted: int, live: int, starts: int) -> None:
        """Take the shards' totals: lifetime rows inserted, live rows, and legal starts among them."""
        self.inserted = inserted
        self.live = live
        self.starts = starts
        if self._asked is not None:
            (ratio, tolerance), self._asked = self._asked, None
            self.adjust(train_ratio=ratio, tolerance_rows=tolerance)

    def pace(self, rows_per_second: float) -> None:
        """Tell how many rows are inserted per second; a paced band follows it."""
        self._rate = max(0.0, rows_per_second)

    def record(self, rows: int) -> None:
        """Count `rows` trained rows (batch * length, context excluded)."""
        self.trained += rows

    def can_train(self, rows: int) -> bool:
        if self.live < self.min_rows or not self.starts or not self.prefilled:
            return False
        return self.error - rows >= -self.train_ratio * self.band_rows - 1e-6

    def insert_budget(self) -> int:
        """Lifetime rows the shards together may reach.

        While training cannot begin for want of rows, whatever the ledger says, the prefill goes on.
        """
        trained = (self.trained - self._origin_trained) / self.train_ratio
        budget = math.floor(self._origin_inserted + self.prefill_rows + self.band_rows + trained + 1e-6)
        needed = self.min_rows - self.live
        if not self.starts:
            needed = max(needed, self.band_rows)
        return max(budget, self.inserted + needed)

    def check_adjust(
        self, *, train_ratio: float | None = None, tolerance_rows: int | None = None
    ) -> tuple[float, int]:
        """The settings that `adjust` would take. Raises: ConfigError when they would deadlock."""
        ratio = self.train_ratio if train_ratio is None else float(train_ratio)
        tolerance = self.tolerance_rows if tolerance_rows is None else tolerance_rows
        if self.paced and tolerance_rows is None and math.isfinite(ratio) and ratio > 0:
            tolerance = max(tolerance, _narrowest(self._update_rows, ratio))
        RateLimiter(ratio, self.prefill_rows, tolerance, self.min_rows).check_update(self._update_rows)
        return ratio, tolerance

    def adjust(self, *, train_ratio: float | None = None, tolerance_rows: int | None = None) -> None:
        """Change the band while running. The past is not recounted: a new ratio begins with the inserted rows
        that are owed now, as far as they fit the new band.

        A tolerance given here is held as it is: the limiter is no longer paced.
        Raises: ConfigError as the constructor and `check_update`, and nothing is changed.
        """
        ratio, tolerance = self.check_adjust(train_ratio=train_ratio, tolerance_rows=tolerance_rows)
        owed, rebase = self.ahead_rows, self.prefilled and ratio != self.train_ratio
        self.train_ratio, self.tolerance_rows = ratio, tolerance
        self.paced = self.paced and tolerance_rows is None
        if rebase:
            self._rebase(min(max(owed, -self.band_rows), self.band_rows))

    def request(self, *, train_ratio: float | None = None, tolerance_rows: int | None = None) -> None:
        """As `adjust`, from any thread: checked here, taken up by the owner's next `observe`."""
        self.check_adjust(train_ratio=train_ratio, tolerance_rows=tolerance_rows)
        ratio, tolerance = self._asked or (None, None)
        self._asked = (
            ratio if train_ratio is None else train_ratio,
            tolerance if tolerance_rows is None else tolerance_rows,
        )

    def _rebase(self, owed_rows: float) -> None:
        """Restart the ledger here with `owed_rows` inserted rows not yet trained on."""
        self._origin_trained = self.trained
        self._origin_inserted = self.inserted - self.prefill_rows - owed_rows
        self._origin_owed = owed_rows

    def state(self) -> dict[str, Any]:
        return {
            "train_ratio": self.train_ratio,
            "prefill_rows": self.prefill_rows,
            "inserted": self.inserted,
            "trained": self.trained,
            "origin_inserted": self._origin_inserted,
            "origin_trained": self._origin_trained,
            "origin_owed": self._origin_owed,
        }

    def load(self, state: Mapping[str, Any], *, unseen: bool = False) -> None:
        """Take up a saved ledger beside the replay as last observed; the band follows this object's settings.

        Rows inserted after the save are owed as usual. When rows are missing (the replay or a shard of it
        was lost), the ledger is rebased so that what was owed then is owed now: a lost replay can
        neither stop training for good nor demand the collection of everything again. An empty
        replay starts with a prefill; `unseen` rows, not checked or heard of yet, say that it is not empty.
        """
        saved = RateLimiter(float(state["train_ratio"]), int(state["prefill_rows"]), 1 << 40, 1)
        saved.inserted, saved.trained = int(state["inserted"]), int(state["trained"])
        saved._origin_inserted = float(state["origin_inserted"])
        saved._origin_trained = int(state["origin_trained"])
        saved._origin_owed = float(state.get("origin_owed", 0.0))
        owed = saved.error / saved.train_ratio
        self.trained = saved.trained
        self._origin_inserted, self._origin_trained = saved._origin_inserted, saved._origin_trained
        self._origin_owed = saved._origin_owed
        same = (saved.train_ratio, saved.prefill_rows) == (self.train_ratio, self.prefill_rows)
        if self.live == 0 and not unseen:
            self._origin_inserted, self._origin_trained = float(self.inserted), self.trained
            self._origin_owed = 0.0
        elif self.inserted < saved.inserted:
            self._rebase(min(max(owed, -self.tolerance_rows), self.tolerance_rows))
            if not saved.prefilled:
                self._origin_owed = 0.0  # the prefill goes on
        elif saved.prefilled and not same:
            self._rebase(owed + self.inserted - saved.inserted)


def _narrowest(rows: int, train_ratio: float) -> int:
    """The smallest band in which updates of `rows` trained rows never leave both sides waiting."""
    return max(1, math.ceil((rows / train_ratio + 1) / 2))
