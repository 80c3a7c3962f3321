"""Ranges of objects fetched ahead of need by a bounded number of threads and kept in bounded memory.

Between `far`, which asks by chunk, and `object_store`. Chunks are kept as stored, compressed: a batch unpacks
them, checking each, so that a few hundred MiB hold as much as many GiB of raw rows.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import numpy as np

from replay.chunk_codec import Bytes
from replay.object_store import ObjectStore, StoreError

PARALLEL = 16
CACHE_NBYTES = 256 << 20
MOST_WAITING = 1024
"""Ranges asked for and not yet here; hints beyond are dropped."""
WAIT_SECONDS = 30.0
DOWN_SECONDS = 5.0
"""A store that failed with all its retries is left alone for so long: other rows are drawn instead."""
SPAN_NBYTES = 8 << 20
"""Neighbouring chunks up to this size are fetched by one request."""

Place = tuple[str, str, int]  # store, key, offset


@dataclass(slots=True, eq=False)
class _Entry:
    """A chunk inside a range that is here or on its way."""

    span: Future[memoryview]
    skip: int
    size: int


class ReadAhead:
    """Fetches and keeps chunks of any number of stores; safe for many threads."""

    def __init__(
        self,
        *,
        parallel: int = PARALLEL,
        cache_nbytes: int = CACHE_NBYTES,
        most_waiting: int = MOST_WAITING,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """`take` waits up to `wait_seconds` for a chunk."""
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="replay-far")
        self._cache_nbytes = cache_nbytes
        self._most_waiting = most_waiting
        self._wait_seconds = wait_seconds
        self._lock = threading.RLock()  # a range may arrive while it is being asked for
        self._entries: OrderedDict[Place, _Entry] = OrderedDict()
        self._nbytes = 0
        self._waiting = 0
        self.hits = 0  # chunks that were asked for ahead, here or on their way
        self.misses = 0
        self.dropped = 0  # hints beyond the bound
        self._down: dict[str, float] = {}  # by store: do not ask before, monotonic

    @property
    def nbytes(self) -> int:
        """Bytes of chunks kept or on their way."""
        return self._nbytes

    def want(self, store: ObjectStore, key: str, chunks: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch chunks (offset, size) of an object, ascending; returns at once."""
        with self._lock:
            if time.monotonic() < self._down.get(store.url, 0.0):
                return
            missing = [(o, n) for o, n in chunks if (store.url, key, o) not in self._entries]
            for span in _spans(missing):
                if self._waiting >= self._most_waiting:
                    self.dropped += 1
                    return
                self._submit(store, key, span)

    def take(self, store: ObjectStore, key: str, offset: int, size: int) -> Bytes:
        """The stored bytes of one chunk, fetched at once when nobody asked ahead.

        Raises: FileNotFoundError; StoreError, also when it takes too long.
        """
        place = (store.url, key, offset)
        with self._lock:
            entry = self._entries.get(place)
            if entry is None:
                self.misses += 1
                if time.monotonic() < self._down.get(store.url, 0.0):
                    raise StoreError(f"{store.url} failed a moment ago; {key} is not asked for")
            else:
                self.hits += 1
                self._entries.move_to_end(place)
        if entry is None:  # not through the pool, where it would wait behind the hints
            span: Future[memoryview] = Future()
            span.set_result(self._get(store, key, offset, offset + size))
            entry = _Entry(span, 0, size)
            with self._lock:
                self._keep(place, entry)
        try:
            found = np.frombuffer(entry.span.result(self._wait_seconds), np.uint8)
        except FutureTimeout as error:
            raise StoreError(f"{key} did not arrive within {self._wait_seconds:g} s") from error
        except (FileNotFoundError, StoreError):
            self.forget(store, key)
            raise
        found = found[entry.skip : entry.skip + entry.size]
        if len(found) != size:
            self.forget(store, key)
            raise StoreError(f"{key} gave {len(found)} bytes at {offset}, must give {size}")
        return found

    def forget(self, store: ObjectStore, key: str) -> None:
        """Drop what is kept of an object, so that it is fetched anew."""
        with self._lock:
            for place in [place for place in self._entries if place[:2] == (store.url, key)]:
                self._nbytes -= self._entries.pop(place).size

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _get(self, store: ObjectStore, key: str, start: int, stop: int) -> memoryview:
        try:
            return store.get_range(key, start, stop)
        except StoreError:
            self._down[store.url] = time.monotonic() + DOWN_SECONDS
            raise

    def _submit(self, store: ObjectStore, key: str, span: list[tuple[int, int]]) -> None:
        """Under the lock: fetch one range of chunks in the background."""
        first, (last, size) = span[0][0], span[-1]
        future = self._pool.submit(self._get, store, key, first, last + size)
        self._waiting += 1
        for offset, n in span:
            self._keep((store.url, key, offset), _Entry(future, offset - first, n))
        future.add_done_callback(self._arrived)

    def _keep(self, place: Place, entry: _Entry) -> None:
        """Under the lock: remember a chunk, forget those that were not used for longest."""
        if (before := self._entries.pop(place, None)) is not None:
            self._nbytes -= before.size
        self._entries[place] = entry
        self._nbytes += entry.size
        while self._nbytes > self._cache_nbytes and len(self._entries) > 1:
            self._nbytes -= self._entries.popitem(last=False)[1].size

    def _arrived(self, _: Future[memoryview]) -> None:
        with self._lock:
            self._waiting -= 1


def _spans(chunks: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Neighbours joined into ranges of at most SPAN_NBYTES."""
    spans: list[list[tuple[int, int]]] = []
    for offset, size in chunks:
        if spans:
            last, before = spans[-1][-1]
            if last + before == offset and offset + size - spans[-1][0][0] <= SPAN_NBYTES:
                spans[-1].append((offset, size))
                continue
        spans.append([(offset, size)])
    return spans


@functools.cache
def shared_read_ahead() -> ReadAhead:
    """The one of this process."""
    return ReadAhead()
