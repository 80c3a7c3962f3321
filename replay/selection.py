"""Which starts a batch is made of: uniform, young, new or worthwhile ones, or a mixture.

Selectors draw from the numbered starts of `replay.starts`; `replay.sampler` asks them. Equal generators,
states and rows give equal draws. Letters: n draws, B batch, E blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from replay.priorities import BlockPriorities, check_priority
from replay.starts import Blocks, Picks, Starts
from system.errors import ConfigError
from system.experience import SequenceIds

NAMES = ("uniform", "online", "recency", "prioritized")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How starts are chosen. Raises: ConfigError for what cannot be."""

    shares: Mapping[str, float] = field(default_factory=lambda: {"uniform": 1.0})
    """Selectors by name with their share of every batch; divided by their sum."""
    exponent: float = 0.6
    """prioritized: power of the priority in the draw; 0 is uniform."""
    importance: float = 0.4
    """prioritized: power of the weights that undo the preference; 1 undoes it fully."""
    half_life: float = 0.0
    """prioritized: draws until a priority fades half-way to that of a new block; 0: it stays."""
    recency: float = 3.0
    """recency: the youngest share x of a stream's starts gets the share x ** (1 / recency) of the draws."""
    backlog: int = 4096
    """online: windows kept waiting; when there are more, the oldest are left to the other selectors."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.shares) - set(NAMES))
        if unknown or any(not np.isfinite(share) or share < 0 for share in self.shares.values()):
            raise ConfigError(
                f"sampling shares ({dict(self.shares)}) must be >= 0 and name selectors of {list(NAMES)}"
            )
        if not sum(self.shares.values()) > 0:
            raise ConfigError(f"sampling shares ({dict(self.shares)}) must have one > 0; e.g. uniform 1")
        if min(self.exponent, self.importance, self.half_life) < 0:
            raise ConfigError(
                f"exponent ({self.exponent}), importance ({self.importance}) and half_life "
                f"({self.half_life}) must be >= 0; 0 turns each off"
            )
        if self.recency < 1 or self.backlog < 1:
            raise ConfigError(
                f"recency ({self.recency}) must be >= 1 (1 is uniform) and backlog ({self.backlog}) >= 1"
            )


class Selector(Protocol):
    """Chooses starts. State is JSON values."""

    def look(self, starts: Starts) -> None:
        """See what is there now; called once before the first draw."""
        ...

    def draw(self, rng: np.random.Generator, starts: Starts, n: int) -> Picks:
        """Draw n starts; `starts` has at least one."""
        ...

    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


def uniform(rng: np.random.Generator, total: int, n: int) -> NDArray[np.int64]:
    """Independent draws from 0 .. total - 1, every legal start equally likely [n]."""
    return rng.integers(0, total, size=n, dtype=np.int64)


class Uniform:
    """Every legal start equally likely."""

    def look(self, starts: Starts) -> None:
        """As Selector: nothing to remember."""

    def draw(self, rng: np.random.Generator, starts: Starts, n: int) -> Picks:
        """As Selector."""
        return starts.pick(uniform(rng, starts.total, n))

    def state(self) -> dict[str, Any]:
        """Nothing: all is in the generator."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""


class Recency:
    """Young starts more often, without a scale of time.

    A stream is as likely as under uniform. Of its m legal starts, the r-th youngest (r = 0, 1, ...) has
    probability ((r + 1) / m) ** (1 / power) - (r / m) ** (1 / power).
    """

    def __init__(self, power: float) -> None:
        self._power = power

    def look(self, starts: Starts) -> None:
        """As Selector: nothing to remember."""

    def draw(self, rng: np.random.Generator, starts: Starts, n: int) -> Picks:
        """As Selector."""
        ends = self._stream_ends(starts)  # [streams]
        which = np.searchsorted(ends, uniform(rng, starts.total, n), side="right")
        count = ends[which] - np.where(which > 0, ends[which - 1], 0)
        age = (count * rng.random(n) ** self._power).astype(np.int64)
        return starts.pick(ends[which] - 1 - np.minimum(age, count - 1))

    def _stream_ends(self, starts: Starts) -> NDArray[np.int64]:
        """Cumulative legal starts by stream: its fragments are neighbours."""
        cumulative = starts.counts()
        shard, stream = starts.index.fragments()[:2]
        last = np.ones(len(shard), np.bool_)
        last[:-1] = (shard[1:] != shard[:-1]) | (stream[1:] != stream[:-1])
        return cumulative[last]

    def state(self) -> dict[str, Any]:
        """Nothing: all is in the generator."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""


class Online:
    """Every new row is trained on once, oldest first; uniform while nothing is new.

    The trained rows of a stream's windows follow each other without overlap; context rows come from the
    window before. Rows there at the first look are not new. Windows wait in a bounded queue; when it is full
    the oldest leave it (`skipped`). Within single episodes, what remains of one behind its last whole window
    is passed over.
    """

    def __init__(self, advance: int, context: int, backlog: int) -> None:
        """Windows are `advance` positions apart and begin `context` positions before their trained rows."""
        self._advance, self._context = advance, context
        self._queue: deque[tuple[int, int, int]] = deque()  # (shard, stream, start), oldest first
        self._backlog = backlog
        self._next: dict[tuple[int, int], int] | None = None  # where a stream's next window begins
        self._seen = (np.zeros(0, np.int64),) * 3  # shard, stream, next start of the fragments [F]
        self._version = -1
        self.skipped = 0

    def draw(self, rng: np.random.Generator, starts: Starts, n: int) -> Picks:
        """As Selector."""
        self.look(starts)
        found: list[tuple[int, int, int]] = []
        while self._queue and len(found) < n:
            shard, stream, start = self._queue.popleft()
            if starts.following(shard, stream, start)[0] == start:  # not evicted meanwhile
                found.append((shard, stream, start))
        rest = starts.pick(uniform(rng, starts.total, n - len(found)))
        places = np.asarray(found, np.int64).reshape(-1, 3).T
        shard, stream, start = (np.concatenate([new, old]) for new, old in zip(places, rest[:3], strict=True))
        return Picks(shard, stream, start, np.ones(n))

    def look(self, starts: Starts) -> None:
        """Queue the windows that became complete."""
        if starts.index.version == self._version:
            return
        self._version = starts.index.version
        shard, stream, lo, hi = starts.index.fragments()
        if self._next is None:
            keys = zip(shard.tolist(), stream.tolist(), hi.tolist(), strict=True)
            self._next = {(k, s): max(0, end - self._context) for k, s, end in keys}  # the last hi counts
        if not (np.array_equal(shard, self._seen[0]) and np.array_equal(stream, self._seen[1])):
            keys = zip(shard.tolist(), stream.tolist(), strict=True)
            following = np.asarray([self._next.get(key, 0) for key in keys], np.int64)
            self._seen = (shard.copy(), stream.copy(), following)
        following = self._seen[2]
        ready = np.flatnonzero(hi - np.maximum(following, lo) >= starts.index.length)
        for f in ready.tolist():
            key = (int(shard[f]), int(stream[f]))
            self._next[key] = self._enqueue(starts, key, max(self._next.get(key, 0), int(following[f])))
            following[(shard == key[0]) & (stream == key[1])] = self._next[key]

    def _enqueue(self, starts: Starts, key: tuple[int, int], at: int) -> int:
        """Queue the windows of one stream from position `at` on; return where the next will begin."""
        while True:
            start, at = starts.following(*key, at)
            if start is None:
                return at
            self._queue.append((*key, start))
            if len(self._queue) > self._backlog:
                self._queue.popleft()
                self.skipped += 1
            at = start + self._advance

    def state(self) -> dict[str, Any]:
        """The queue, and how far every stream was looked at."""
        known = None if self._next is None else [[*key, at] for key, at in sorted(self._next.items())]
        return {"queue": [list(entry) for entry in self._queue], "next": known, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken: rows that came since are new."""
        self._queue = deque((int(k), int(s), int(at)) for k, s, at in state["queue"])
        known = state["next"]
        self._next = None if known is None else {(int(k), int(s)): int(at) for k, s, at in known}
        self.skipped = int(state["skipped"])
        self._seen = (np.zeros(0, np.int64),) * 3
        self._version = -1


class Prioritized:
    """A start is drawn in proportion to priority ** exponent of the block it lies in.

    Its weight is (N P) ** -importance for probability P among N legal starts, which undoes the preference
    when importance is 1. The sampler divides by the largest of a batch. arXiv 1511.05952, sections 3.3, 3.4.
    """

    def __init__(self, exponent: float, importance: float, half_life: float) -> None:
        self._importance = importance
        self.priorities = BlockPriorities(exponent, half_life)
        self._blocks: Blocks | None = None
        self._version = -1

    def look(self, starts: Starts) -> None:
        """As Selector: blocks that are new count as the best."""
        self._follow(starts)

    def draw(self, rng: np.random.Generator, starts: Starts, n: int) -> Picks:
        """As Selector."""
        legal = self._follow(starts).legal
        weights = self.priorities.weights()
        cumulative = np.cumsum(weights * legal, dtype=np.float64)  # [E]
        self.priorities.tick()
        drawn = rng.random(n) * cumulative[-1]
        block = np.searchsorted(cumulative, drawn, side="right")
        block = np.minimum(block, np.flatnonzero(legal)[-1]) if (block >= len(legal)).any() else block
        inside = (rng.random(n) * legal[block]).astype(np.int64)
        picks = starts.pick(self._before[block] + inside)
        probability = weights[block] / cumulative[-1]
        return picks._replace(weight=(starts.total * probability.astype(np.float64)) ** -self._importance)

    def write(self, starts: Starts, ids: SequenceIds, offset: int, priority: NDArray[Any], step: int) -> int:
        """New priorities [B, L] of rows start + offset * step on; return how many are not live any more.

        Raises: SchemaError.
        """
        check_priority(priority, len(ids.start))
        self._follow(starts)
        return self.priorities.write(ids.shard, ids.stream, ids.start + offset * step, priority, step)

    def _follow(self, starts: Starts) -> Blocks:
        if self._blocks is None or starts.index.version != self._version:
            self._version = starts.index.version
            self._blocks = starts.blocks()
            self._before = np.cumsum(self._blocks.legal) - self._blocks.legal  # [E]
            self.priorities.follow(self._blocks)
        return self._blocks

    def state(self) -> dict[str, Any]:
        """The priorities."""
        return self.priorities.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """As BlockPriorities."""
        self.priorities.load(state)
        self._blocks = None


def split(rng: np.random.Generator, shares: Sequence[float], n: int) -> list[int]:
    """Whole parts of n, each floor or ceil of its share and exactly its share in expectation.

    One uniform number moves a comb over the cumulative shares (systematic sampling).
    """
    marks = np.floor(np.cumsum(shares) / np.sum(shares) * n + rng.random()).astype(np.int64)
    marks[-1] = n  # whatever rounding says
    return np.diff(marks, prepend=0).tolist()


def make_selectors(sampling: Sampling, *, advance: int, context: int) -> dict[str, Selector]:
    """The selectors that have a share, by name; `advance` and `context` in positions, as Online."""
    made: dict[str, Selector] = {}
    for name, share in sampling.shares.items():
        if share == 0:
            continue
        if name == "uniform":
            made[name] = Uniform()
        elif name == "online":
            made[name] = Online(advance, context, sampling.backlog)
        elif name == "recency":
            made[name] = Recency(sampling.recency)
        else:
            made[name] = Prioritized(sampling.exponent, sampling.importance, sampling.half_life)
    return made
