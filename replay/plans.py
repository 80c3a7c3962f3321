"""Which sequences the next batches are made of: sources by weight, selectors by share, goals.

Between `selection` (which knows one index) and `sampler` (which copies). Letters: n sequences, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.batch_spec import BatchSpec
from replay.episodes import EpisodeStarts
from replay.index import StartIndex
from replay.selection import Prioritized, Sampling, Selector, make_selectors, split
from replay.starts import Picks, PlainStarts, Starts
from system.errors import ConfigError, DeadlineError
from system.experience import SequenceIds
from system.seeds import generator
from system.specs import ArraySpec


@dataclass(slots=True, kw_only=True)
class Plan:
    """Sequences to be copied. Made by the planner, taken by the sampler; lists: they are saved as JSON."""

    source: list[int]  # [n]
    shard: list[int]  # [n]
    stream: list[int]  # [n]
    start: list[int]  # [n]
    weight: list[float]  # [n], importance weights before they are normalised; empty without any
    goal: list[int]  # [n] positions, empty without goals

    def replace(self, row: int, other: Plan) -> None:
        """Put the one sequence of `other` in the place of `row`."""
        for name in self.__slots__:
            if values := getattr(other, name):
                getattr(self, name)[row] = values[0]


class Pool:
    """One source of sequences: its starts, how they are selected, and its weight among the sources."""

    def __init__(
        self,
        index: StartIndex[Any],
        weight: float,
        spec: BatchSpec,
        sampling: Sampling,
        specs: Mapping[str, ArraySpec],
    ) -> None:
        if not (np.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weight of a replay source ({weight}) must be >= 0 and finite; set it")
        assert index.length == spec.span, (index.length, spec.span)
        self.index = index
        self.weight = weight
        self.episodes = None
        if not spec.cross_episodes or spec.step > 1:
            self.episodes = EpisodeStarts(index, dict(specs))
        self.starts: Starts = PlainStarts(index)
        if not spec.cross_episodes:
            assert self.episodes is not None
            self.starts = self.episodes
        advance, context = spec.length * spec.step, spec.context * spec.step
        self.selectors = make_selectors(sampling, advance=advance, context=context)

    @property
    def prioritized(self) -> Prioritized | None:
        """Where priorities of this source are kept, if anywhere."""
        found = self.selectors.get("prioritized")
        return found if isinstance(found, Prioritized) else None


class Planner:
    """Draws what batches are made of. Equal seed, rows and calls give equal plans."""

    def __init__(
        self,
        specs: Mapping[str, ArraySpec],
        spec: BatchSpec,
        indices: Sequence[tuple[StartIndex[Any], float]],
        *,
        sampling: Sampling,
        seed: int,
    ) -> None:
        """`indices` are the sources with their weights: the first is the run's own.

        Raises: ConfigError when no source has a weight > 0.
        """
        self._spec = spec
        self._sampling = sampling
        self._rng = generator(seed, "replay", "sample")
        self.pools = [Pool(index, weight, spec, sampling, specs) for index, weight in indices]
        if not any(pool.weight for pool in self.pools):
            raise ConfigError("one replay source must have a weight > 0; raise that of the run's own rows")
        shares = [sampling.shares[name] for name in self.pools[0].selectors]
        self._shares = shares
        self.weighted = sampling.importance > 0 and self.pools[0].prioritized is not None

    @property
    def starts(self) -> int:
        """Legal starts of all sources that have a weight."""
        return sum(pool.starts.total for pool in self.pools if pool.weight)

    def plan(self, n: int) -> Plan:
        """Plan n sequences. Raises: DeadlineError when there is nothing to draw from."""
        parts = [(k, picks) for k, count in self._counts(n) for picks in self._select(self.pools[k], count)]
        if len(parts) == 1:
            source, picks = [parts[0][0]] * n, parts[0][1]
        else:
            order = self._rng.permutation(n)
            source = np.concatenate([np.full(len(p.start), k) for k, p in parts])[order].tolist()
            columns = zip(*(p for _, p in parts), strict=True)
            picks = Picks(*(np.concatenate(column)[order] for column in columns))
        plan = Plan(
            source=source,
            shard=picks.shard.tolist(),
            stream=picks.stream.tolist(),
            start=picks.start.tolist(),
            weight=picks.weight.tolist() if self.weighted else [],
            goal=[],
        )
        if self._spec.goal:
            plan.goal = [self._goal(plan, row) for row in range(n)]
        return plan

    def write(self, source: int, ids: SequenceIds, offset: int, priority: NDArray[Any]) -> int:
        """Keep priorities [B, L] of one source; return the rows among them that are not live any more."""
        pool = self.pools[source]
        if pool.prioritized is None:
            return 0
        return pool.prioritized.write(pool.starts, ids, offset, priority, self._spec.step)

    def look(self) -> None:
        """Let selectors see what came."""
        for pool in self.pools:
            for selector in pool.selectors.values():
                selector.look(pool.starts)

    def _counts(self, n: int) -> list[tuple[int, int]]:
        """(source, sequences) of those sources that have something to give."""
        usable = [k for k, pool in enumerate(self.pools) if pool.weight and pool.starts.total]
        if not usable:
            raise DeadlineError("no source has a sequence to draw; wait for rows or check the replay's disk")
        if len(usable) == 1:
            return [(usable[0], n)]
        return list(zip(usable, split(self._rng, [self.pools[k].weight for k in usable], n), strict=True))

    def _select(self, pool: Pool, n: int) -> list[Picks]:
        selectors: list[Selector] = list(pool.selectors.values())
        counts = [n] if len(selectors) == 1 else split(self._rng, self._shares, n)
        drawn = zip(selectors, counts, strict=True)
        return [selector.draw(self._rng, pool.starts, count) for selector, count in drawn if count]

    def _goal(self, plan: Plan, row: int) -> int:
        """A row from the last of the window to the newest known one of the episode, all equally likely."""
        episodes = self.pools[plan.source[row]].episodes
        assert episodes is not None
        last = plan.start[row] + self._spec.span - 1
        end = episodes.end(plan.shard[row], plan.stream[row], last)
        return last if end is None else int(self._rng.integers(last, end))

    # ---- checkpoint -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The generator and what the selectors know, as JSON values."""
        return {
            "rng": dict(self._rng.bit_generator.state),
            "spec": asdict(self._spec),
            "sources": [
                {name: selector.state() for name, selector in pool.selectors.items()} for pool in self.pools
            ],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state; selectors and sources that it lacks begin anew."""
        self._rng.bit_generator.state = dict(state["rng"])
        for pool, saved in zip(self.pools, state["sources"], strict=False):
            for name, selector in pool.selectors.items():
                if name in saved:
                    selector.load(saved[name])

    def fits(self, state: Mapping[str, Any]) -> bool:
        """The state was taken with the same batches and sources: its plans can be kept."""
        return state["spec"] == asdict(self._spec) and len(state["sources"]) == len(self.pools)
