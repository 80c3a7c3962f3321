"""The learn loop: batch in, update, latents back into replay, weights out, now and then a checkpoint.

A generator: whoever iterates decides the pace, logs the ticks and stops by `until`. It knows no model
(`system.interfaces.Agent` does the update) and no wire. Next stop of the data: `learner.publish`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from learner.batches import Batches
from learner.checkpoint import CheckpointStore, Loaded, check_signature
from learner.health.alarms import HealthEvent
from learner.publish import Publisher
from system.errors import DeadlineError, DivergedError, PreflightError, RankLostError
from system.experience import Sequence
from system.interfaces import Agent, ReplayReader
from system.metrics import Metrics
from system.weights import PolicyVersion, nonfinite

log = logging.getLogger(__name__)

CLAIM_SECONDS = 10.0
FLUSH_SECONDS = 30.0


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has been done over all resumes. Owned by the loop, saved in every checkpoint."""

    updates: int = 0  # those that made the weights what they are: a rollback takes it back
    rows_trained: int = 0  # context excluded
    nonfinite: int = 0
    rollbacks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerTick:
    """One update, or one wait that brought no batch. Made by learn_loop, taken by the learner role."""

    progress: Progress  # a copy
    metrics: Mapping[str, float]  # of this update; empty when there was none
    version: PolicyVersion  # newest handed to the publisher
    wait_seconds: float
    update_seconds: float
    checkpoint: Path | None = None  # written after this update
    waiting: str = ""  # why there was no batch
    health: tuple[HealthEvent, ...] = ()  # alarms that went on or off


def never() -> bool:
    return False


class Health(Protocol):
    """Who watches the learning. `learner.health.watch` does it; it changes nothing of the agent."""

    def after_update(
        self, update: int, values: Mapping[str, float], sequence: Sequence
    ) -> tuple[HealthEvent, ...]: ...
    def after_nonfinite(self, update: int, values: Mapping[str, float]) -> tuple[HealthEvent, ...]: ...
    def while_waiting(self, update: int) -> tuple[HealthEvent, ...]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


class ReplayCuts(Protocol):
    """How a checkpoint remembers, and may hold on to, the rows that replay had. `replay.pins` does it."""

    def take(self, checkpoint: str) -> Mapping[str, Any] | None: ...
    def prune(self, checkpoints: Collection[str]) -> None: ...


def resume(
    store: CheckpointStore,
    agent: Agent,
    reader: ReplayReader | Batches,
    publisher: Publisher,
    signature: Mapping[str, Any],
    *,
    note: Callable[[Mapping[str, Any]], None] | None = None,
    health: Health | None = None,
) -> Progress:
    """Load the newest checkpoint that verifies into all of these; return how far it had come, else zeros.

    `signature` says what the model and environment are now; note() is told the checkpoint's meta first.
    Raises: ConfigError naming what differs from the checkpoint's; IntegrityError when none is sound.
    """
    loaded = store.newest_sound()
    if loaded is None:
        return Progress()
    check_signature(signature, loaded.meta["signature"])
    if note is not None:
        note(loaded.meta)
    agent.load(loaded.state["agent"])
    reader.load(loaded.state["reader"])
    publisher.load(loaded.state["publisher"])
    if health is not None and (watched := loaded.state.get("health")) is not None:
        health.load(watched)
    log.info("resumed", extra={"path": str(loaded.path), "updates": loaded.step})
    return Progress(**loaded.state["progress"])


def learn_loop(
    agent: Agent,
    batches: Batches,
    publisher: Publisher,
    store: CheckpointStore,
    *,
    signature: Mapping[str, Any],
    checkpoint_seconds: float,
    checkpoint_on_start: bool = True,
    checkpoint_asked: Callable[[], bool] = never,
    total_updates: int | None = None,
    until: Callable[[], bool] = never,
    progress: Progress | None = None,
    rollback_after: int = 10,
    starve_seconds: float = 3600.0,
    cuts: ReplayCuts | None = None,
    health: Health | None = None,
    save_when_lost: bool = True,
    metrics: Metrics | None = None,
) -> Iterator[LearnerTick]:
    """Train until `total_updates` or until() is true, then publish, checkpoint and end; one tick per update.

    `checkpoint_on_start` fixes the new epoch on disk before a version of it is published. When
    checkpoint_asked(), called once per tick, is true there is one more. `rollback_after` non-finite
    updates in a row go back to the newest checkpoint. `cuts` note in every checkpoint which rows there were;
    `health` looks at every update and says what is wrong. With `save_when_lost` the death of another learner
    rank costs no update: what this one has is saved first, all but the batch under way.
    Batches and publisher are stopped however the loop ends; closing the generator leaves no checkpoint.
    Raises: DivergedError when non-finite updates go on after a rollback, DeadlineError after
    `starve_seconds` without a batch, PreflightError when the first or last checkpoint cannot be written,
    RankLostError when another rank is gone.
    """
    metrics = metrics if metrics is not None else Metrics("", "learner")
    cut = _Cut(
        agent, batches, publisher, store, progress or Progress(), dict(signature), cuts, health, metrics
    )
    guard = _Guard(cut, rollback_after)
    done = cut.progress
    with _ended(cut, guard, save_when_lost=save_when_lost):
        publisher.claim(CLAIM_SECONDS)
        if checkpoint_on_start:
            cut.save()
        publisher.publish()
        feed = _Feed(batches, starve_seconds)
        while not until() and (total_updates is None or done.updates < total_updates):
            sequence, waited = feed.next()
            if sequence is None:
                saved = cut.save_if_due(math.inf, asked=checkpoint_asked())
                seen = health.while_waiting(done.updates) if health is not None else ()
                yield _tick(cut, {}, waited, 0.0, checkpoint=saved, waiting=feed.why, health=seen)
                continue
            values, seconds = _update(agent, batches, sequence, done, metrics)
            seen = _look(health, done.updates, values, sequence)
            saved = None
            if guard.accept(values):
                publisher.after_update()
                saved = cut.save_if_due(checkpoint_seconds, asked=checkpoint_asked())
            yield _tick(cut, values, waited, seconds, checkpoint=saved, health=seen)
        _finish(cut, publisher, healthy=guard.healthy)


@contextmanager
def _ended(cut: _Cut, guard: _Guard, *, save_when_lost: bool) -> Iterator[None]:
    """Save what there is when another rank is lost; stop batches and publisher in any case."""
    try:
        yield
    except RankLostError as error:
        if error.intact and save_when_lost and guard.healthy:
            cut.save_if_due(0.0, asked=True)
        raise
    finally:
        cut.batches.stop()
        cut.publisher.stop()


def _update(
    agent: Agent, batches: Batches, sequence: Sequence, done: Progress, metrics: Metrics
) -> tuple[dict[str, float], float]:
    """One update with its write-back and counters; return its metrics and seconds."""
    begun = time.monotonic()
    batch, rows = sequence.shape
    # Sampled sequences do not continue each other: what an agent carries comes from the replay context.
    _carry, values, write_back = agent.learn(sequence, agent.initial(batch))
    seconds = time.monotonic() - begun
    if not is_finite(values):
        return values, seconds
    if write_back is not None:
        batches.write_back(write_back)
    trained = batch * (rows - sequence.context)
    done.updates += 1
    done.rows_trained += trained
    metrics["learner_updates_total"].inc()
    metrics["learner_rows_trained_total"].inc(trained)
    metrics["learner_update_seconds"].observe(seconds)
    for name, value in values.items():
        if name.startswith("loss/"):
            metrics.labels("learner_loss", part=name.removeprefix("loss/")).set(value)
    if "grad_norm" in values:
        metrics["learner_grad_norm"].set(values["grad_norm"])
    return values, seconds


def _look(
    health: Health | None, update: int, values: Mapping[str, float], sequence: Sequence
) -> tuple[HealthEvent, ...]:
    if health is None:
        return ()
    if is_finite(values):
        return health.after_update(update, values, sequence)
    return health.after_nonfinite(update, values)


def is_finite(values: Mapping[str, float]) -> bool:
    """False for an update the agent skipped (`nonfinite` > 0) or whose losses or gradient are not finite."""
    judged = [v for k, v in values.items() if k.startswith("loss") or k == "grad_norm"]
    return values.get("nonfinite", 0.0) == 0.0 and all(map(math.isfinite, judged))


def _tick(cut: _Cut, values: Mapping[str, float], waited: float, seconds: float, **more: Any) -> LearnerTick:
    return LearnerTick(
        progress=Progress(**asdict(cut.progress)),
        metrics=values,
        version=cut.publisher.version,
        wait_seconds=waited,
        update_seconds=seconds,
        **more,
    )


def _finish(cut: _Cut, publisher: Publisher, *, healthy: bool) -> None:
    if not healthy:
        log.warning("ended without a checkpoint: the last update was not finite")
        return
    publisher.publish()
    cut.save()
    try:
        publisher.flush(FLUSH_SECONDS)
    except DeadlineError as error:
        log.warning("last weights not accepted", extra={"why": str(error)})


class _Feed:
    """Batches with a limit to patience."""

    def __init__(self, batches: Batches, starve_seconds: float) -> None:
        self._batches, self._starve_seconds = batches, starve_seconds
        self._waited = 0.0
        self.why = ""

    def next(self) -> tuple[Sequence | None, float]:
        """(batch, or None when none came in time; seconds waited since the last one)."""
        begun = time.monotonic()
        try:
            sequence = self._batches.next()
        except DeadlineError as error:
            self._waited += time.monotonic() - begun
            self.why = str(error)
            if self._waited >= self._starve_seconds:
                raise DeadlineError(
                    f"the learner had no batch for {self._waited:.0f} s, must have one within "
                    f"{self._starve_seconds:g} s: {error}"
                ) from error
            return None, self._waited
        waited, self._waited = self._waited + time.monotonic() - begun, 0.0
        return sequence, waited


class _Cut:
    """Takes consistent cuts: weights, reader ledger, version and counters as of the same update."""

    def __init__(
        self,
        agent: Agent,
        batches: Batches,
        publisher: Publisher,
        store: CheckpointStore,
        progress: Progress,
        signature: dict[str, Any],
        cuts: ReplayCuts | None,
        health: Health | None,
        metrics: Metrics,
    ) -> None:
        self.agent, self.publisher, self.progress, self.metrics = agent, publisher, progress, metrics
        self.batches, self._store, self._signature, self._cuts = batches, store, signature, cuts
        self._health = health
        self._last = time.monotonic()
        self.saves = 0

    def save(self) -> Path | None:
        """Save a checkpoint; None when the weights are not finite, which must never be saved."""
        self._last = time.monotonic()
        if broken := nonfinite(self.agent.weights()):
            log.warning("checkpoint not saved", extra={"nonfinite": broken[:3]})
            return None
        name = self._store.next_name(self.progress.updates)
        # The rows are pinned before the checkpoint that needs them exists, and released after it is gone.
        reader, rows = self.batches.snapshot(lambda: self._cuts.take(name) if self._cuts else None)
        state = {
            "agent": self.agent.state(),
            "reader": reader,
            "publisher": self.publisher.state(),
            "progress": asdict(self.progress),
        }
        if self._health is not None:
            state["health"] = self._health.state()
        meta = {"signature": self._signature, "unixtime": time.time(), "replay": rows}
        path = self._store.save(self.progress.updates, state, meta)
        if self._cuts is not None:
            self._cuts.prune([kept.name for kept in self._store.paths()])
        self.saves += 1
        self.metrics["learner_checkpoints_total"].inc()
        self.metrics["learner_checkpoint_unixtime"].set_to_current_time()
        return path

    def save_if_due(self, every_seconds: float, *, asked: bool) -> Path | None:
        """As save, when asked or every so often; a full disk only postpones it, earlier ones stay."""
        if not asked and time.monotonic() - self._last < every_seconds:
            return None
        try:
            return self.save()
        except PreflightError as error:
            log.error("checkpoint postponed", extra={"why": str(error)})
            return None

    def restore(self) -> Loaded | None:
        """Put the agent back to the newest checkpoint; the reader goes on, so other data follow."""
        loaded = self._store.newest()
        if loaded is not None:
            self.agent.load(loaded.state["agent"])
            self.progress.updates = loaded.step
        return loaded


class _Guard:
    """Contains divergence: counts non-finite updates, rolls back after a streak, gives up at the next."""

    def __init__(self, cut: _Cut, rollback_after: int) -> None:
        assert rollback_after >= 1, rollback_after
        self._cut, self._limit = cut, rollback_after
        self._streak = 0
        self._saves_at_rollback = -1

    @property
    def healthy(self) -> bool:
        return self._streak == 0

    def accept(self, values: Mapping[str, float]) -> bool:
        """True for a finite update. Raises: DivergedError."""
        if is_finite(values):
            self._streak = 0
            return True
        self._streak += 1
        self._cut.progress.nonfinite += 1
        self._cut.metrics["learner_nonfinite_total"].inc()
        log.warning("update not finite", extra={"in_a_row": self._streak, "metrics": dict(values)})
        if self._streak >= self._limit:
            self._roll_back()
        return False

    def _roll_back(self) -> None:
        again = self._cut.saves == self._saves_at_rollback
        loaded = None if again else self._cut.restore()
        if loaded is None:
            why = "again after going back to the newest checkpoint" if again else "and there is no checkpoint"
            raise DivergedError(
                f"{self._streak} updates in a row were not finite, {why}; "
                "lower the learning rate, check rewards and observations for extreme values, "
                "or resume from an older checkpoint"
            )
        self._streak, self._saves_at_rollback = 0, self._cut.saves
        self._cut.progress.rollbacks += 1
        self._cut.publisher.publish()
        log.warning("rolled back", extra={"path": str(loaded.path), "updates": loaded.step})
