"""What a resumed run does with its replay before any shard opens: `replay.resume` keep, exact or fresh.

Called by `deploy.session` once nothing of an earlier life runs any more. The learner's side, which loads the
checkpoint, is `deploy.learner_role`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from deploy import assemble
from deploy.audit import RESTORED
from deploy.learner_role import signature
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from learner.checkpoint import CheckpointStore, check_signature
from replay import layout
from replay.cut import Cut, take_cut
from replay.restore import TRASH, empty_trash, restore_exact
from system.errors import ConfigError, IntegrityError, PreflightError
from system.metrics import Metrics
from system.specs import EnvSpec

if TYPE_CHECKING:
    from replay.reader import LocalReader

log = logging.getLogger(__name__)
RELEASE_SECONDS = 90.0
"""Shards of a driver that was killed may take so long to notice and let go of their directories."""
POLL_SECONDS = 0.1
SETTLE_SECONDS = 600.0


def prepare_replay(config: RunConfig, env_spec: EnvSpec, run_dir: RunDirectory) -> None:
    """Bring the replay of a resumed run to where `replay.resume` wants it; keep leaves it alone.

    Raises: IntegrityError when exact lacks its pins; PreflightError when shards stay open or the disk
    refuses.
    """
    mode = config.replay.resume
    if mode != "keep" and (run_dir.replay / "table.json").exists():
        _await_release(run_dir)
        if mode == "exact":
            _restore(config, run_dir)
        else:
            _empty(config, env_spec, run_dir)
    if (run_dir.replay / TRASH).exists():  # also what a killed run did not get to
        threading.Thread(target=empty_trash, args=(run_dir.replay,), name="trash", daemon=True).start()


def check_evolution(config: RunConfig, env_spec: EnvSpec, run_dir: RunDirectory) -> None:
    """Refuse a replay or weights that do not fit what the environment shows, before anything is changed.

    Raises: SchemaError when stored rows cannot be read; ConfigError for weights: replay may evolve, they
    cannot. Each says what to do.
    """
    table, root = assemble.table_spec(config, env_spec), run_dir.replay
    if (root / "table.json").exists():
        layout.read_history(root).under(table, root, evolve=True)
    newest = CheckpointStore(run_dir.checkpoints, config.learner.keep_checkpoints).newest_meta()
    if newest is None:
        return
    name, meta = newest
    try:
        check_signature(signature(config, env_spec), meta["signature"])
    except ConfigError as error:
        raise ConfigError(
            f"replay.evolve=true, but {run_dir.checkpoints / name} does not fit: {error}. To train new "
            f"weights on the stored rows, move {run_dir.checkpoints} away and resume again"
        ) from error


def cut_of(name: str, meta: Mapping[str, Any]) -> Cut:
    """The cut that a checkpoint names. Raises: IntegrityError when it has none."""
    value = meta.get("replay")
    if not isinstance(value, Mapping):
        raise IntegrityError(
            f"checkpoint {name} does not say which rows replay had; resume with --set replay.resume=keep"
        )
    return Cut.from_json(value)


def compare_replay(
    config: RunConfig, run_dir: RunDirectory, meta: Mapping[str, Any], reader: LocalReader, incarnation: int
) -> int:
    """Rows of the replay that the weights of a checkpoint have not seen; reported as an event.

    When the replay was brought back for this life of the learner, this waits until every row has been checked
    and can be drawn: with fewer, other batches would follow. Raises: IntegrityError when rows are missing.
    """
    if not isinstance(meta.get("replay"), Mapping):
        return 0
    cut = cut_of("resumed from", meta)
    younger = younger_rows(run_dir, cut)
    run_dir.event("replay compared", mode=config.replay.resume, younger_rows=younger)
    log.info("rows younger than the weights", extra={"rows": younger, "mode": config.replay.resume})
    if config.replay.resume == "exact" and _restored_for(run_dir, incarnation):
        settled = reader.settle(SETTLE_SECONDS)
        _, live = reader.counts()
        if not settled or live < cut.rows:
            raise IntegrityError(
                f"only {live} of the {cut.rows} rows of the checkpoint can be read (see `dreamfleet replay "
                "verify`); resume with --set replay.resume=keep"
            )
    return younger


def _restored_for(run_dir: RunDirectory, incarnation: int) -> bool:
    """Whether this is the learner's first life after a restore: later ones share the run with actors."""
    lives = [event["incarnations"] for event in run_dir.events() if event["event"] == RESTORED]
    return bool(lives) and int(lives[-1].get("learner-0", 0)) + 1 == incarnation


def younger_rows(run_dir: RunDirectory, cut: Cut) -> int:
    """Rows inserted after a cut that are there now."""
    now = take_cut(run_dir.replay)
    return min(now.rows, max(0, now.inserted - cut.inserted))


def _await_release(run_dir: RunDirectory) -> None:
    deadline = time.monotonic() + RELEASE_SECONDS
    for index in layout.shard_indices(run_dir.replay):
        while True:
            try:
                layout.take_lock(layout.shard_dir(run_dir.replay, index)).close()
                break
            except PreflightError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(POLL_SECONDS)


def _restore(config: RunConfig, run_dir: RunDirectory) -> None:
    newest = CheckpointStore(run_dir.checkpoints, config.learner.keep_checkpoints).newest_meta()
    if newest is None:  # killed before the first one: nothing was trained, so no row is too young
        run_dir.event("replay kept", reason="there is no checkpoint to go back to")
        return
    name, meta = newest
    done = restore_exact(run_dir.replay, name, cut_of(name, meta))
    run_dir.event(
        RESTORED,
        checkpoint=name,
        incarnations=run_dir.incarnations(),  # lives whose younger rows are given up
        rows=done.rows,
        removed_rows=done.removed,
        returned_segments=done.returned,
        undone_rows=done.undone,
    )


def _empty(config: RunConfig, env_spec: EnvSpec, run_dir: RunDirectory) -> None:
    """Evict all rows. Positions and counts of rows go on, so that nothing old can be taken for new."""
    rows = 0
    for index in layout.shard_indices(run_dir.replay):
        metrics = Metrics(config.name, "replay", index)
        shard = assemble.replay_shard(config, env_spec, str(run_dir.path), index, metrics)
        with closing(shard):
            rows += shard.stats().rows
            shard.clear()
    run_dir.event("replay emptied", rows=rows)
