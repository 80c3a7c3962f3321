"""Processes that use a replay until they are killed: writers, owners, a mover, a learner with checkpoints.

Each life goes on where the acknowledgements of the lives before it end. What was acknowledged is one line of
acks.log, written before the next append is made, so the log never claims more than the replay promised.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from replay import layout, synthetic
from replay.client import GrpcReplayWriter
from replay.move import move
from replay.pins import PinStore
from replay.rows import write_overlay
from replay.service import serve_shard
from replay.shard import ReplayShard
from replay.tiers import stages_of
from replay.view import TableView
from system.errors import DeadlineError, PreflightError
from system.experience import SequenceIds, StreamId, WriteBack
from system.specs import ActionSpec, ArraySpec, EnvSpec, TableSpec

TABLE = TableSpec.of(
    EnvSpec(
        name="synthetic",
        obs={
            "cells": ArraySpec(shape=(320,), dtype="uint8", kind="discrete", classes=2),
            "vector": ArraySpec(shape=(80,), dtype="float32"),
        },
        action=ActionSpec(kind="discrete", classes=(3,)),
    ),
    {"latent": ArraySpec(shape=(2,), dtype="uint16")},
)
"""One wide column that compresses, one that does not, narrow ones, and latents."""
REPLAY, ACKS, CUTS, ADDRESS, READY = "replay", "acks.log", "cuts", "address", "ready"
ENVS, SEGMENT_ROWS, KEPT_CUTS = 3, 256, 2
TIMEOUT = 20.0
PAUSE_SECONDS = 0.002


def acknowledged(folder: Path) -> dict[int, int]:
    """Rows of each environment that were acknowledged so far."""
    found: dict[int, int] = {}
    path = folder / ACKS
    for line in path.read_text().splitlines() if path.exists() else ():
        env, stored = map(int, line.split())
        found[env] = max(found.get(env, 0), stored)
    return found


def open_shard(root: Path, index: int, capacity_rows: int) -> ReplayShard:
    """A shard of small segments that seals at once and compresses all but the newest two."""
    directory = layout.shard_dir(root, index)
    stages = stages_of(directory, index, TABLE, compress=True, cold_after=2, far=None, far_after=0)
    return ReplayShard(
        root, index, TABLE, capacity_rows=capacity_rows, segment_rows=SEGMENT_ROWS, stages=stages
    )


def own(folder: Path, seed: int, capacity_rows: int) -> None:
    """A life of a shard that appends to itself; sealing, compressing and evicting go on behind it."""
    shard = open_shard(folder / REPLAY, 0, capacity_rows)
    _append_for_ever(folder, seed, lambda chunk: shard.append([chunk], TIMEOUT))


def serve(folder: Path, seed: int, capacity_rows: int) -> None:
    """A life of a shard process for writers; asks for the port of the life before it."""
    path = folder / ADDRESS
    address = path.read_text() if path.exists() else "127.0.0.1:0"
    shard = open_shard(folder / REPLAY, 0, capacity_rows)
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            server = serve_shard(shard, address)
            break
        except PreflightError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    _put(path, server.address)
    (folder / READY).touch()
    time.sleep(600)


def write(folder: Path, seed: int, capacity_rows: int) -> None:
    """A life of an actor's sending side."""
    writer = GrpcReplayWriter((folder / ADDRESS).read_text(), TABLE)
    _append_for_ever(folder, seed, lambda chunk: writer.append([chunk], TIMEOUT))


def shift(folder: Path, seed: int, capacity_rows: int) -> None:
    """A life of two shards: the first appends, and its oldest sealed segments move to the second."""
    rng = random.Random(seed)
    source = open_shard(folder / REPLAY, 0, capacity_rows)
    target = open_shard(folder / REPLAY, 1, capacity_rows)

    def append(chunk: Any) -> None:
        source.append([chunk], TIMEOUT)
        sealed = source.sealed()
        if len(sealed) > 2 and rng.random() < 0.5:
            move(source, target, sealed[0])

    _append_for_ever(folder, seed, append)


def checkpoint(folder: Path, seed: int, capacity_rows: int) -> None:
    """A life of a learner: overwrites latents, pins what it sees, writes the cut down, prunes older ones."""
    rng = random.Random(seed)
    root, cuts = folder / REPLAY, folder / CUTS
    cuts.mkdir(exist_ok=True)
    pins = PinStore(root, hold=True)
    view = TableView(root, TABLE, 1)
    view.settle(TIMEOUT)
    saved = sorted(cuts.glob("0*.json"))
    number = int(saved[-1].stem) if saved else 0
    (folder / READY).touch()
    while True:
        view.refresh()
        for (index, stream), runs in list(view.index.streams.items()):
            lo, hi = list(runs.bounds)[-1]
            if hi - lo > 20:
                back = latents(index, stream, rng.randrange(lo, hi - 20), rng)
                write_overlay(TABLE, view.index, back, before=pins.before)
        number += 1
        _put(cuts / f"{number:08d}.json", json.dumps(pins.take(f"{number:08d}")))
        saved = sorted(cuts.glob("0*.json"))
        for old in saved[:-KEPT_CUTS]:
            old.unlink()
        pins.prune([path.stem for path in saved[-KEPT_CUTS:]])


LIVES: dict[str, Callable[[Path, int, int], None]] = {
    "own": own, "serve": serve, "write": write, "shift": shift, "checkpoint": checkpoint,
}  # fmt: skip


def fill_disk(folder: Path, seed: int, capacity_rows: int) -> None:
    """Append until the disk is full, then give room back and go on; report what happened in a file."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(4 << 20))
    shard = open_shard(folder / REPLAY, 0, capacity_rows)
    rng, sent, refused = random.Random(seed), 0, ""

    def append(timeout: float) -> None:
        nonlocal sent
        count = rng.randrange(1, 90)
        shard.append([synthetic.rows(TABLE, StreamId(actor=0, env=0), sent, count)], timeout)
        sent += count

    while not refused:
        try:
            append(0.5)
        except (PreflightError, DeadlineError) as error:
            refused = str(error)
    kept = shard.stats().inserted
    ballast.unlink()
    for _ in range(20):
        sent = shard.stats().inserted
        append(TIMEOUT)
    shard.close()
    report = {"refused": refused, "before": kept, "after": shard.stats().inserted, "sent": sent}
    (folder / "report.json").write_text(json.dumps(report))


def _append_for_ever(folder: Path, seed: int, append: Callable[[Any], object]) -> None:
    """Chunks of random length to random environments, each acknowledgement logged before the next append."""
    rng = random.Random(seed)
    sent = acknowledged(folder)
    log = os.open(folder / ACKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    while True:
        env, count = rng.randrange(ENVS), rng.randrange(1, 90)
        start = sent.get(env, 0)
        append(synthetic.rows(TABLE, StreamId(actor=0, env=env), start, count))
        sent[env] = start + count
        os.write(log, f"{env} {sent[env]}\n".encode())
        (folder / READY).touch()
        time.sleep(rng.random() * 2 * PAUSE_SECONDS)


def latents(shard: int, stream: int, start: int, rng: random.Random) -> WriteBack:
    """20 rows of latents, one random value throughout."""
    ids = SequenceIds(
        shard=np.asarray([shard], np.int32),
        stream=np.asarray([stream], np.int32),
        start=np.asarray([start], np.int64),
    )
    spec = TABLE.overlay["latent"]
    values = np.full((1, 20, *spec.shape), rng.randrange(1 << 16), spec.dtype)
    return WriteBack(ids=ids, offset=0, columns={"latent": values})


def _put(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.rename(path)
