"""Rows of another shard on their way here: asked for ahead of need, several sequences per call.

Between `remote` (which knows where rows are) and the wire. Rows that were written back while a call was on
its way are corrected on arrival, so a learner reads what it wrote.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from numpy.typing import NDArray

from replay.experience_pb2 import ReadReply, ReadRequest
from replay.messages import MESSAGE_BYTES, RowCodec
from replay.rows import RowsGone, RowViews, copy_rows
from replay.served import Span

QUEUED, SENT, READY, GONE = range(4)
MOST_SPANS = 16
"""Sequences of one call."""
MOST_ENTRIES = 4096
"""Spans kept: what was asked ahead and never taken leaves, the oldest first."""
RETRY_SECONDS = 0.05
"""How soon a busy shard is asked again."""

Ask = Callable[[ReadRequest], Any]
"""Starts a call and returns its grpc.Future; None when the shard cannot be called."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One span: asked `uses` times, its rows lie in `columns` [R, ...] from row `at` on."""

    span: Span
    state: int = QUEUED
    uses: int = 0
    tick: int = 0  # when it was sent
    columns: dict[str, NDArray[Any]] | None = None
    views: RowViews | None = None
    at: int = 0


@dataclass(slots=True, eq=False)
class Patch:
    """Rows written back: position `start` on of one stream."""

    origin: int
    stream: int
    start: int
    column: str
    values: NDArray[Any]  # [rows, ...]
    acked: int | None = None  # tick when the shard had it


def _overlap(patch: Patch, span: Span) -> tuple[int, int]:
    """Positions (first, end) that both have; empty when end <= first."""
    return max(span.start, patch.start), min(span.start + span.rows, patch.start + len(patch.values))


class RowFetcher:
    """Fetches spans of one shard. `want` and `take` belong to one thread, answers come on others."""

    def __init__(
        self,
        codec: RowCodec,
        ask: Ask,
        failed: Callable[[Any], None],
        *,
        parallel: int,
        seconds: float,
    ) -> None:
        """`ask` starts a call, `failed` hears of one without an answer; `take` waits up to `seconds`."""
        self._codec = codec
        self._ask = ask
        self._failed = failed
        self._parallel = parallel
        self._seconds = seconds
        self._longest = max(1, MESSAGE_BYTES // codec.row_nbytes)  # rows of one span
        self._changed = threading.Condition()
        self._entries: OrderedDict[Span, _Entry] = OrderedDict()
        self._queue: deque[_Entry] = deque()
        self._patches: list[Patch] = []
        self._tick = 0
        self._calls = 0
        self.life = 0  # of the shard; 0 while it is away
        self.fetched_rows = 0

    def want(self, origin: int, stream: int, start: int, rows: int) -> None:
        """These rows will be taken soon. Returns at once."""
        with self._changed:
            if not self.life:
                return
            for span in self._cut(origin, stream, start, rows):
                self._entry(span).uses += 1
            enough = len(self._queue) >= MOST_SPANS // 2
        if enough:
            self._send()

    def take(self, target: RowViews, at: int, origin: int, stream: int, start: int, rows: int) -> None:
        """Copy rows to row `at` of `target`, fetching what was not asked for. Raises: RowsGone."""
        spans = self._cut(origin, stream, start, rows)
        with self._changed:
            for span in spans:
                entry = self._entry(span)
                entry.uses = max(entry.uses, 1)
        deadline = time.monotonic() + self._seconds
        for span in spans:
            views, first = self._arrived(span, deadline)
            copy_rows(target, at, views, first, span.rows)
            at += span.rows

    def patch(self, origin: int, stream: int, start: int, column: str, values: NDArray[Any]) -> Patch | None:
        """Remember rows that are being written back; None while the shard is away."""
        with self._changed:
            if not self.life:
                return None
            made = Patch(origin, stream, start, column, values.copy())
            self._patches.append(made)
            return made

    def patched(self, patches: list[Patch]) -> None:
        """The shard has them: what is sent from now on needs no correction."""
        with self._changed:
            self._tick += 1
            for patch in patches:
                patch.acked = self._tick
            sent = [entry.tick for entry in self._entries.values() if entry.state in (SENT, READY)]
            oldest = min(sent, default=self._tick)
            self._patches = [p for p in self._patches if p.acked is None or p.acked > oldest]

    @property
    def kept(self) -> int:
        """Spans asked for and not yet taken."""
        return len(self._entries)

    def start(self, life: int) -> None:
        """The shard is there, in this life."""
        with self._changed:
            self._drop_all()
            self.life = life

    def stop(self) -> None:
        """The shard is gone: whoever waits for its rows hears it now."""
        with self._changed:
            self.life = 0
            self._drop_all()

    def _drop_all(self) -> None:
        for entry in self._entries.values():
            entry.state = GONE
        self._entries.clear()
        self._queue.clear()
        self._patches.clear()
        self._changed.notify_all()

    def _cut(self, origin: int, stream: int, start: int, rows: int) -> list[Span]:
        end = start + rows
        return [
            Span(origin, stream, at, min(self._longest, end - at)) for at in range(start, end, self._longest)
        ]

    def _entry(self, span: Span) -> _Entry:
        entry = self._entries.get(span)
        if entry is None:
            entry = self._entries[span] = _Entry(span)
            self._queue.append(entry)
            while len(self._entries) > MOST_ENTRIES:
                self._entries.popitem(last=False)[1].state = GONE
        return entry

    def _arrived(self, span: Span, deadline: float) -> tuple[RowViews, int]:
        """Wait for a span and use it once."""
        with self._changed:
            entry = self._entry(span)
        while True:
            self._send()
            with self._changed:
                if not self.life or entry.state == GONE:
                    self._entries.pop(span, None)
                    raise RowsGone(f"{span} is gone")
                if entry.state == READY:
                    entry.uses -= 1
                    if entry.uses <= 0:
                        self._entries.pop(span, None)
                    return self._corrected(entry)
                if time.monotonic() >= deadline:
                    self._entries.pop(span, None)
                    raise RowsGone(f"{span} did not arrive within {self._seconds:g} s")
                self._changed.wait(RETRY_SECONDS if entry.state == QUEUED else deadline - time.monotonic())

    def _corrected(self, entry: _Entry) -> tuple[RowViews, int]:
        """The entry's rows with what was written back since they were asked for."""
        assert entry.columns is not None
        assert entry.views is not None
        span = entry.span
        late = [
            (patch, first, end)
            for patch in self._patches
            if (patch.origin, patch.stream) == (span.origin, span.stream)
            and (patch.acked is None or patch.acked > entry.tick)
            for first, end in [_overlap(patch, span)]
            if first < end
        ]
        if not late:
            return entry.views, entry.at
        rows = {name: a[entry.at : entry.at + span.rows].copy() for name, a in entry.columns.items()}
        for patch, first, end in late:
            values = patch.values[first - patch.start : end - patch.start]
            rows[patch.column][first - span.start : end - span.start] = values
        return RowViews(rows), 0

    # ---- calls ------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Start calls for what is queued, as many as may be on their way."""
        while True:
            with self._changed:
                group = self._next_group()
                if not group:
                    return
                self._calls += 1
                self._tick += 1
                for entry in group:
                    entry.state, entry.tick = SENT, self._tick
                request = ReadRequest(
                    life=self.life,
                    origin=[e.span.origin for e in group],
                    stream=[e.span.stream for e in group],
                    start=[e.span.start for e in group],
                    count=[e.span.rows for e in group],
                )
            call = self._ask(request)
            if call is None:
                self._give_up(group)
                return
            call.add_done_callback(lambda done, group=group: self._answered(group, done))

    def _give_up(self, group: list[_Entry]) -> None:
        with self._changed:
            self._calls -= 1
            for entry in group:
                entry.state = GONE
            self._changed.notify_all()

    def _next_group(self) -> list[_Entry]:
        group: list[_Entry] = []
        rows = 0
        while self.life and self._calls < self._parallel and self._queue and len(group) < MOST_SPANS:
            if group and rows + self._queue[0].span.rows > self._longest:
                break
            entry = self._queue.popleft()
            if entry.state == QUEUED:
                group.append(entry)
                rows += entry.span.rows
        return group

    def _answered(self, group: list[_Entry], call: Any) -> None:
        """Runs on a gRPC thread."""
        code = call.code()
        failed = code != grpc.StatusCode.OK
        busy = code == grpc.StatusCode.RESOURCE_EXHAUSTED
        with self._changed:
            self._calls -= 1
            if busy:
                for entry in group:
                    entry.state = QUEUED
                self._queue.extendleft(reversed(group))
            elif failed or not self._unpack(group, call.result()):
                for entry in group:
                    entry.state = GONE
            self._changed.notify_all()
        if failed and not busy:
            self._failed(call)
        elif not busy:
            self._send()

    def _unpack(self, group: list[_Entry], reply: ReadReply) -> bool:
        """Give the rows of an answer to their entries; False when it is none."""
        rows, payload = list(reply.rows), reply.payload
        total = sum(rows)
        fits = len(rows) == len(group) and len(payload) == total * self._codec.row_nbytes
        if not fits or any(n not in (0, e.span.rows) for n, e in zip(rows, group, strict=True)):
            return False
        columns = self._codec.views(payload, total)
        views = RowViews(columns)
        at = 0
        for entry, count in zip(group, rows, strict=True):
            if entry.state == SENT:
                entry.columns, entry.views, entry.at = columns, views, at
                entry.state = READY if count else GONE
            at += count
        self.fetched_rows += total
        return True
