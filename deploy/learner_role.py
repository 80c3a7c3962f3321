"""The learner as a role: builds agent, reader, publisher and store, resumes, and runs the learn loop
in slices. The only role that loads torch for training. Neighbours: `learner.loop`, `deploy.roles`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import assemble, health
from deploy.learner_ranks import device_of, place_of
from deploy.limit import LimitKeeper
from deploy.roles import RoleSpec
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from system.config import flatten
from system.metrics import Metrics
from system.specs import EnvSpec

if TYPE_CHECKING:
    from learner.loop import LearnerTick
    from learner.ranks import RankHub

BATCH_SECONDS = 0.5
"""Longest silence of the loop while no batch is due; the role reports in between."""


def signature(config: RunConfig, env_spec: EnvSpec) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that loads it: model family, its settings, the spaces."""
    from learner.catalog import make_config
    from learner.families.dreamer.config import EXECUTION

    family = make_config(config.learner.family, config.learner.settings).model_dump(exclude=set(EXECUTION))
    env = env_spec.to_json()
    spaces = flatten({"obs": env["obs"], "action": env["action"]})
    return {"family": config.learner.family, **flatten(family, "settings."), **spaces}


def taken(request: Path) -> bool:
    """True once for each time somebody creates the file `request`."""
    try:
        request.unlink()
    except FileNotFoundError:
        return False
    return True


class LearnerRole:
    """Trains as fast as the limiter allows, publishes, checkpoints; one loop, advanced in slices."""

    def __init__(self, spec: RoleSpec) -> None:
        self._spec, self._config = spec, spec.run_config()
        self.metrics = Metrics(self._config.name, "learner", spec.index)
        self._stopping = False

    def start(self) -> dict[str, Any]:
        """Build everything and resume from the newest checkpoint that verifies, if there is one."""
        import torch

        from learner.batches import Batches
        from learner.checkpoint import CheckpointStore
        from learner.loop import learn_loop, resume
        from learner.publish import Publisher
        from learner.transfer import batch_buffers
        from system.params.client import GrpcWeightSink

        spec, config = self._spec, self._config
        torch.set_num_threads(config.learner.threads)
        env_spec = EnvSpec.from_json(spec.env_spec)
        inner, agent = self._agent(env_spec)
        self._pins = assemble.replay_pins(config, spec.run_dir)
        self._reader = assemble.replay_reader(
            config, env_spec, spec.run_dir, spec.shard_addresses, self.metrics, pins=self._pins
        )
        sink = GrpcWeightSink(spec.params_address, security=assemble.security(config))
        publisher = Publisher(  # lives begin at 1; rows of an earlier one may be there without its weights
            agent, sink, config.learner.publish_updates, epoch=max(1, spec.incarnation), metrics=self.metrics
        )
        run_dir = self._run_dir = RunDirectory(Path(spec.run_dir))
        self._limits = LimitKeeper(run_dir, config, self._reader.limiter)
        self._limits.restore()
        store = CheckpointStore(run_dir.checkpoints, config.learner.keep_checkpoints)
        named = signature(config, env_spec)
        batches = Batches(
            self._reader,
            config.learner.prefetch,
            BATCH_SECONDS,
            ring=assemble.reader_ring(config),
            exact=config.replay.resume == "exact",
            buffer=batch_buffers(inner.device),
        )
        self._watch = assemble.health_watch(config, env_spec, inner, self._reader, self.metrics)
        progress = resume(
            store, agent, batches, publisher, named, note=partial(self._compare, run_dir), health=self._watch
        )
        health.settle(run_dir, (raised.alarm for raised in self._watch.active), progress.updates)
        self._loop: Iterator[LearnerTick] = learn_loop(
            agent,
            batches,
            publisher,
            store,
            signature=named,
            checkpoint_seconds=config.learner.checkpoint_seconds,
            checkpoint_asked=lambda: taken(run_dir.checkpoint_request),
            total_updates=config.updates,
            until=self._until,
            progress=progress,
            cuts=self._pins,
            health=self._watch,
            save_when_lost=config.replay.resume != "exact",  # the batch under way would be left out
            metrics=self.metrics,
        )
        return {"updates": progress.updates, "younger_rows": self._younger}

    def _agent(self, env_spec: EnvSpec) -> tuple[Any, Any]:
        """The agent of this process, and the one of all ranks, which it is when there are no others."""
        if self._config.learner.ranks == 1:
            alone = assemble.agent(self._config, env_spec)
            return alone, alone
        from learner.devices import resolve_device
        from learner.ranks import RankedAgent, RankHub

        device = device_of(self._spec)
        self._hub = RankHub(place_of(self._spec), resolve_device(device))  # first: agents look at the group
        inner = assemble.agent(self._config, env_spec, device=device)
        return inner, RankedAgent(inner, self._hub, metrics=self.metrics)

    def _until(self) -> bool:
        """Asked once per tick. Raises: RankLostError: also between updates nobody waits for a lost rank."""
        if self._hub is not None:
            self._hub.check()
        return self._stopping

    def _compare(self, run_dir: RunDirectory, meta: Mapping[str, Any]) -> None:
        """Say how the replay differs from what the checkpoint saw; wait for all of it when it is the same."""
        from deploy.resume import compare_replay

        self._younger = compare_replay(self._config, run_dir, meta, self._reader, self._spec.incarnation)
        self.metrics["learner_younger_rows"].set(self._younger)

    def work(self, seconds: float) -> dict[str, Any]:
        """Advance the loop for about `seconds`, at least one tick."""
        until = time.monotonic() + seconds
        self._limits.poll()
        for tick in self._loop:
            self._tick = tick
            health.write_events(self._run_dir, tick.health)
            if tick.metrics:
                self._newest = dict(tick.metrics)
            if time.monotonic() >= until:
                break
        else:  # all updates are done: whoever drives will say stop
            time.sleep(seconds)
        return self._status(self._tick)

    _hub: RankHub | None = None
    _tick: LearnerTick | None = None
    _younger = 0  # rows in replay that the weights resumed from had not seen
    _newest: dict[str, float] = {}  # noqa: RUF012 (replaced, never changed in place)

    def _status(self, tick: LearnerTick | None) -> dict[str, Any]:
        limiter = self._reader.limiter
        out: dict[str, Any] = {
            "owed_rows": limiter.error,
            "inserted": limiter.inserted,
            "train_ratio": limiter.held_ratio if limiter.prefilled and not self._config.offline else None,
            "train_ratio_asked": limiter.train_ratio,
            "governor": self._reader.governor.report(),
            "metrics": self._newest,
            "younger_rows": self._younger,
            "alarms": [raised.alarm for raised in self._watch.active],
        }
        if tick is not None:
            done = tick.progress
            out |= {"updates": done.updates, "rows_trained": done.rows_trained, "nonfinite": done.nonfinite}
            out |= {
                "rollbacks": done.rollbacks,
                "published": tick.version.counter,
                "epoch": tick.version.epoch,
            }
            out |= {"update_seconds": tick.update_seconds, "waiting": tick.waiting}
        return out

    def stop(self) -> dict[str, Any]:
        """End the loop: it publishes and checkpoints once more."""
        self._stopping = True
        ticks = list(self._loop)
        for tick in ticks:
            health.write_events(self._run_dir, tick.health)
        if self._hub is not None:
            self._hub.close()
        self._reader.close()
        self._pins.close()
        return self._status(ticks[-1] if ticks else self._tick)
