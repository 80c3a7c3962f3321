"""Checks segments before their rows are drawn, in the background, the newest first: training starts soon.

A reader vets what it did not see growing and nobody alive vouches for. Between `follow`, which asks, and
`seal` and `checks`, which know the checksums.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replay import seal
from system.errors import IntegrityError

STOP_SECONDS = 10.0


def sealed_rows(path: Path, committed: NDArray[np.int64]) -> NDArray[np.int64]:
    """All committed rows of a sealed segment, whose files were read and found as its manifest says [S].

    Raises: IntegrityError when they are not, FileNotFoundError when the segment is gone.
    """
    if damage := seal.verify(path):
        raise IntegrityError(f"{path}: {damage[0].what} ({len(damage)} faults)")
    return committed.copy()


class Verdict:
    """What became of one segment. Written once by the vetting thread, `done` last."""

    def __init__(self) -> None:
        self.done = False
        self.good: NDArray[np.int64] | None = None  # [S] rows of each slot that may be read
        self.error: Exception | None = None


class Vetting:
    """A queue of segments and at most one thread that works on it; the thread ends when there is nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: list[tuple[int, int, Callable[[], NDArray[np.int64]], Verdict]] = []
        self._turn = itertools.count()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Segments that nobody has begun with."""
        return len(self._queue)

    def submit(self, number: int, work: Callable[[], NDArray[np.int64]]) -> Verdict:
        """Have `work` done in the background, of all that wait the highest `number` first."""
        verdict = Verdict()
        with self._lock:
            heapq.heappush(self._queue, (-number, next(self._turn), work, verdict))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="replay-vetting", daemon=True)
                self._thread.start()
        return verdict

    def settle(self, timeout: float) -> bool:
        """Wait until nothing is left to do; False when that took longer."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def stop(self) -> None:
        """Forget what waits and wait for the segment in work."""
        with self._lock:
            self._queue.clear()
        self.settle(STOP_SECONDS)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                *_, work, verdict = heapq.heappop(self._queue)
            judge(work, verdict)


def judge(work: Callable[[], NDArray[np.int64]], verdict: Verdict) -> Verdict:
    """Do the work now and keep what it found, be it an error: whoever asked decides about it."""
    try:
        verdict.good = work()
    except Exception as error:
        verdict.error = error
    verdict.done = True
    return verdict
