"""The ledger of training that owes nothing to collecting: from datasets alone, or a mere look inside."""

from __future__ import annotations

from replay.limiter import RateLimiter


class OfflineLedger(RateLimiter):
    """A batch whenever there is a start to draw; nothing may be inserted. Counts what is trained."""

    def __init__(self) -> None:
        super().__init__(1.0, prefill_rows=0, tolerance_rows=1 << 40, min_rows=1)

    @property
    def error(self) -> float:
        """No trained rows are owed."""
        return 0.0

    def can_train(self, rows: int) -> bool:
        """As RateLimiter, whatever was inserted."""
        return self.starts > 0

    def insert_budget(self) -> int:
        """As RateLimiter: what is there already."""
        return self.inserted
