"""Keeps training and collecting in step: pure bookkeeping, no clocks, no threads.

With N rows inserted and M rows trained since the origin of the ledger,

    error = train_ratio * (N - prefill_rows) - M                       (in trained rows)
    training  waits while  error - rows < -train_ratio * tolerance_rows
    inserting waits while  error        >  train_ratio * tolerance_rows

so both sides are bounded: collectors may be tolerance_rows ahead of the learner, and behind it. Both
cannot wait at once when 2 * tolerance_rows - 1 >= rows / train_ratio. The reader (`replay.sampler`)
asks and tells; the shards only ever see `insert_budget`, split among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from system.errors import ConfigError


class RateLimiter:
    """Ledger of inserted and trained rows and the band between them."""

    def __init__(self, train_ratio: float, prefill_rows: int, tolerance_rows: int, min_rows: int) -> None:
        """See the module for the band; `min_rows` live rows are needed before any training.

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
        self.inserted = 0
        self.live = 0
        self.starts = 0
        self.trained = 0
        self._origin_inserted = 0.0
        self._origin_trained = 0

    def check_update(self, rows: int) -> None:
        """Raises: ConfigError when updates of `rows` trained rows could leave both sides waiting."""
        needed = math.ceil((rows / self.train_ratio + 1) / 2)
        if self.tolerance_rows < needed:
            raise ConfigError(
                f"tolerance_rows ({self.tolerance_rows}) must satisfy 2 * tolerance_rows - 1 >= batch rows / "
                f"train_ratio ({rows} / {self.train_ratio:g}), or learner and actors would wait for each "
                f"other; raise tolerance_rows to {needed} or more"
            )

    @property
    def error(self) -> float:
        """Trained rows owed (positive: train) or overdrawn (negative: collect)."""
        since = self.inserted - self._origin_inserted - self.prefill_rows
        return self.train_ratio * since - (self.trained - self._origin_trained)

    @property
    def held_ratio(self) -> float:
        """Trained rows per inserted row since prefill; 0 before."""
        since = self.inserted - self._origin_inserted - self.prefill_rows
        return (self.trained - self._origin_trained) / since if since > 0 else 0.0

    @property
    def prefilled(self) -> bool:
        return self.inserted - self._origin_inserted >= self.prefill_rows

    def observe(self, inserted: int, live: int, starts: int) -> None:
        """Take the shards' totals: lifetime rows inserted, live rows, and legal starts among them."""
        self.inserted = inserted
        self.live = live
        self.starts = starts

    def record(self, rows: int) -> None:
        """Count `rows` trained rows (batch * length, context excluded)."""
        self.trained += rows

    def can_train(self, rows: int) -> bool:
        if self.live < self.min_rows or not self.starts or not self.prefilled:
            return False
        return self.error - rows >= -self.train_ratio * self.tolerance_rows - 1e-6

    def insert_budget(self) -> int:
        """Lifetime rows the shards together may reach.

        While training cannot begin for want of rows, whatever the ledger says, the prefill goes on.
        """
        trained = (self.trained - self._origin_trained) / self.train_ratio
        budget = math.floor(self._origin_inserted + self.prefill_rows + self.tolerance_rows + trained + 1e-6)
        needed = self.min_rows - self.live
        if not self.starts:
            needed = max(needed, self.tolerance_rows)
        return max(budget, self.inserted + needed)

    def adjust(self, *, train_ratio: float | None = None, tolerance_rows: int | None = None) -> None:
        """Change the band while running. What is owed in inserted rows stays owed; the past is not recounted.

        Raises: ConfigError as the constructor.
        """
        ratio = self.train_ratio if train_ratio is None else float(train_ratio)
        tolerance = self.tolerance_rows if tolerance_rows is None else tolerance_rows
        RateLimiter(ratio, self.prefill_rows, tolerance, self.min_rows)
        if self.prefilled:
            self._rebase(self.error / self.train_ratio)
        self.train_ratio, self.tolerance_rows = ratio, tolerance

    def _rebase(self, owed_rows: float) -> None:
        """Restart the ledger here with `owed_rows` inserted rows not yet trained on."""
        self._origin_trained = self.trained
        self._origin_inserted = self.inserted - self.prefill_rows - owed_rows

    def state(self) -> dict[str, Any]:
        return {
            "train_ratio": self.train_ratio,
            "prefill_rows": self.prefill_rows,
            "inserted": self.inserted,
            "trained": self.trained,
            "origin_inserted": self._origin_inserted,
            "origin_trained": self._origin_trained,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved ledger beside the replay as last observed; the band follows this object's settings.

        Rows inserted after the save are owed as usual. When rows are missing (the replay or a shard of it
        was lost), the ledger is rebased so that what was owed then is owed now: a lost replay can
        neither stop training for good nor demand the collection of everything again. An empty
        replay starts with a prefill.
        """
        saved = RateLimiter(float(state["train_ratio"]), int(state["prefill_rows"]), 1 << 40, 1)
        saved.inserted, saved.trained = int(state["inserted"]), int(state["trained"])
        saved._origin_inserted = float(state["origin_inserted"])
        saved._origin_trained = int(state["origin_trained"])
        owed = saved.error / saved.train_ratio
        self.trained = saved.trained
        self._origin_inserted, self._origin_trained = saved._origin_inserted, saved._origin_trained
        same = (saved.train_ratio, saved.prefill_rows) == (self.train_ratio, self.prefill_rows)
        if self.live == 0:
            self._origin_inserted, self._origin_trained = float(self.inserted), self.trained
        elif self.inserted < saved.inserted:
            self._rebase(min(max(owed, -self.tolerance_rows), self.tolerance_rows))
        elif saved.prefilled and not same:
            self._rebase(owed + self.inserted - saved.inserted)
