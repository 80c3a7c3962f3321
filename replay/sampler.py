"""Turns planned sequences into batches. Between `plans` (which ones) and `reader` (when one may be drawn).

Rows are copied through their homes. Where those may have to wait for a disk or the network, batches are
planned ahead and announced; what is gone when its turn comes is replaced by another draw.
Letters: B batch, T rows of a sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from replay.batch_spec import BatchSpec
from replay.batches import BatchBuffer, BatchRing, mark_borders
from replay.index import Piece, StreamRuns
from replay.plans import Plan, Planner
from replay.rows import Home, RowsGone, RowViews
from system.errors import DeadlineError
from system.experience import Sequence, SequenceIds
from system.specs import ArraySpec

REDRAWS = 32
"""Draws that may fail per sequence, on average over a batch, before it is given up."""


def _covers(runs: StreamRuns[Any], position: int, count: int) -> bool:
    """These rows are live without a gap."""
    for lo, hi in runs.bounds:  # noqa: SIM110 - any() over a generator costs four times as much
        if lo <= position and position + count <= hi:
            return True
    return False


class Sampler:
    """Batches over the sources of a planner."""

    def __init__(
        self, specs: Mapping[str, ArraySpec], spec: BatchSpec, planner: Planner, *, ring: int
    ) -> None:
        """The `ring`-th draw after a batch overwrites its columns."""
        self._specs = specs
        self._spec = spec
        self._planner = planner
        self._ring = BatchRing(specs, spec.batch, spec.time, ring)
        self._plans: deque[Plan] = deque()
        self.redraws = 0
        """Sequences that were gone when they were to be copied."""

    def draw(self, ahead: int = 0) -> Sequence:
        """One batch [B, T], after planning `ahead` more than it.

        Raises: DeadlineError when what is drawn is gone again and again.
        """
        while len(self._plans) <= ahead:
            plan = self._planner.plan(self._spec.batch)
            if ahead:
                self._announce(plan)
            self._plans.append(plan)
        plan = self._plans.popleft()
        buffer = self._ring.take()
        goal = BatchBuffer(self._specs, 1, self._spec.batch) if self._spec.goal else None
        failures = 0
        gone = self._copy(plan, range(self._spec.batch), buffer, goal)
        while gone:
            failures += len(gone)
            self.redraws += len(gone)
            if failures > REDRAWS * self._spec.batch:
                raise DeadlineError(
                    f"{failures} sequences drawn for one batch were gone when they were to be copied; "
                    "check that the replay shards are alive and their disks readable"
                )
            for row in gone:
                plan.replace(row, self._planner.plan(1))
            gone = self._copy(plan, gone, buffer, goal)
        return self._finish(plan, buffer, goal)

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, as JSON values: plans verbatim, all else by the planner."""
        return self._planner.state() | {"plans": [asdict(plan) for plan in self._plans]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state; plans made for other batches, or without the weights asked for, are left out."""
        self._planner.load(state)
        plans = [Plan(**plan) for plan in state["plans"]] if self._planner.fits(state) else []
        self._plans = deque(plan for plan in plans if plan.weight or not self._planner.weighted)
        for plan in self._plans:
            self._announce(plan)

    # ---- copying ----------------------------------------------------------------------------------

    def _copy(
        self, plan: Plan, rows: Iterable[int], buffer: BatchBuffer, goal: BatchBuffer | None
    ) -> list[int]:
        """Copy some sequences of a plan; returns those that are gone."""
        streams = [pool.index.streams for pool in self._planner.pools]
        span, plain, gone = self._spec.span, self._spec.step == 1, list[int]()
        for row in rows:
            start = plan.start[row]
            runs = streams[plan.source[row]].get((plan.shard[row], plan.stream[row]))
            if runs is None or not _covers(runs, start, span):
                gone.append(row)
                continue
            target, at = buffer.sequences[row], 0
            try:
                if plain:
                    for home, first, count in runs.pieces(start, span):
                        home.copy_rows(target, at, first, count)
                        at += count
                else:
                    self._copy_spread(runs, start, target)
                    self._mark_skipped(plan, row, buffer)
                if goal is not None and not self._copy_goal(runs, plan.goal[row], row, goal):
                    gone.append(row)
            except RowsGone:
                gone.append(row)
        return gone

    def _copy_goal(self, runs: StreamRuns[Home], position: int, row: int, goal: BatchBuffer) -> bool:
        if not _covers(runs, position, 1):
            return False
        for home, first, _ in runs.pieces(position, 1):
            home.copy_rows(goal.sequences[0], row, first, 1)
        return True

    def _live(self, plan: Plan, row: int, position: int, count: int) -> StreamRuns[Home] | None:
        """The runs that have these rows without a gap, None when some are gone."""
        index = self._planner.pools[plan.source[row]].index
        runs = index.streams.get((plan.shard[row], plan.stream[row]))
        return runs if runs is not None and _covers(runs, position, count) else None

    def _copy_spread(self, runs: StreamRuns[Home], start: int, target: RowViews) -> None:
        step, at = self._spec.step, 0
        begin = start
        for home, first, count in runs.pieces(start, self._spec.span):
            while (inside := start + at * step - begin) < count and at < self._spec.time:
                home.copy_rows(target, at, first + inside, 1)
                at += 1
            begin += count

    def _mark_skipped(self, plan: Plan, row: int, buffer: BatchBuffer) -> None:
        """A kept row is_first also when an episode began among the rows skipped before it."""
        episodes = self._planner.pools[plan.source[row]].episodes
        assert episodes is not None
        positions = plan.start[row] + np.arange(self._spec.time) * self._spec.step
        begins = episodes.begins(plan.shard[row], plan.stream[row], positions)  # [T - 1]
        buffer.columns["is_first"][row, 1:] |= begins

    def _announce(self, plan: Plan) -> None:
        """Tell the homes what will be copied; what is gone by now is found out when its turn comes."""
        for row, start in enumerate(plan.start):
            runs = self._live(plan, row, start, self._spec.span)
            if runs is None:
                continue
            pieces: list[Piece[Home]] = list(runs.pieces(start, self._spec.span))
            if plan.goal and self._live(plan, row, plan.goal[row], 1) is not None:
                pieces += runs.pieces(plan.goal[row], 1)
            for home, first, count in pieces:
                home.will_need(first, count)

    def _finish(self, plan: Plan, buffer: BatchBuffer, goal: BatchBuffer | None) -> Sequence:
        mark_borders(buffer.columns["is_first"], buffer.columns["is_last"])
        several = len(self._planner.pools) > 1
        ids = SequenceIds(
            shard=np.asarray(plan.shard, np.int32),
            stream=np.asarray(plan.stream, np.int32),
            start=np.asarray(plan.start, np.int64),
            source=np.asarray(plan.source, np.int8) if several else None,
        )
        weights = None
        if self._planner.weighted:
            raw = np.asarray(plan.weight)
            weights = (raw / raw.max()).astype(np.float32)
        return Sequence(
            columns=dict(buffer.columns),
            ids=ids,
            context=self._spec.context,
            weights=weights,
            goal=None if goal is None else {name: rows[0] for name, rows in goal.columns.items()},
        )
