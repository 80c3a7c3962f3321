"""A replay over three nodes that loses one: seconds without a batch, uniformity, seconds until it is back.

The learner's side is in this process and reads every shard over gRPC. A node is killed as by a power cut, its
disk stays; then it comes back at another address. Silent nodes are cut off instead: they answer nothing and
refuse nothing, so only the reader's patience finds out. `--nodes process` does the same without Ray.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from bench.cluster_nodes import TABLE, Nodes, ProcessNodes
from bench.load import Load, Row, Samples
from replay import synthetic
from replay.client import GrpcReplayWriter
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.remote import RemoteShard
from system.errors import InfrastructureError
from system.experience import StreamId

STREAM_ROWS: Mapping[int, tuple[int, ...]] = {0: (260, 90), 1: (300,), 2: (120, 70, 150)}
"""Rows of every stream, by shard: of different lengths, so that drawing shards alike would show."""
BATCH, LENGTH = 16, 16
DRAWS = 300
"""Batches of one test of uniformity."""
PLANNED = 8
"""Batches that may have been planned before a change."""
TIMEOUT = 60.0
LEGAL = {
    (shard, shard << 16 | env, start)
    for shard, streams in STREAM_ROWS.items()
    for env, rows in enumerate(streams)
    for start in range(rows - LENGTH + 1)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """What one loss of a node cost. Made by `Table.lose_node`."""

    pause_seconds: float  # longest time without a batch, from the loss until the shard had left
    noticed_seconds: float  # from the loss until its rows could no longer be drawn
    return_seconds: float  # from the start of a new node until its rows could be drawn again
    serve_seconds: float  # from when its shard listened until then
    p_before: float  # chi-square over all legal starts: of all shards
    p_during: float  # of those that lived
    p_after: float
    p_shards: float  # chi-square of the draws from each shard, the least of the three times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", choices=("ray", "process"), default="ray", help="what a node is")
    parser.add_argument("--trials", type=int, default=3, help="times each node is lost and comes back")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per figure, over all trials; probabilities are the least of all."""
    outages: list[Outage] = []
    silences: list[Outage] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder,
        open_nodes(options.nodes, Path(folder)) as nodes,
        Table(Path(folder), nodes) as table,
        Load() as load,
    ):
        for _ in range(options.trials):
            outages += [table.lose_node(index) for index in STREAM_ROWS]
            silences += [table.lose_node(index, silent=True) for index in STREAM_ROWS]
    for what, found in (("killed", outages), ("silent", silences)):
        for name in (field.name for field in fields(Outage)):
            values = tuple(float(getattr(outage, name)) for outage in found)
            samples = Samples(values=values, foreign_load=load.foreign, cpu_per_wall=load.cpu_per_wall)
            case = f"{options.nodes} node {what}"
            if name.startswith("p_"):
                yield samples.row("cluster", case, f"{name}_least", "probability", value=min(values))
            else:
                yield samples.row("cluster", case, name, "s")
                yield samples.row("cluster", case, f"{name}_most", "s", value=max(values))


@contextmanager
def open_nodes(kind: str, folder: Path) -> Iterator[Nodes]:
    """Nodes of one kind, process or ray, that keep their disks below `folder`."""
    if kind == "process":
        with ProcessNodes(folder) as nodes:
            yield nodes
        return
    from deploy.ray_local import prepare_ray

    prepare_ray()
    from bench.cluster_ray import RayNodes

    with RayNodes(folder) as nodes:
        yield nodes


class Table:
    """A filled table over the nodes, and the reader that samples it from here."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self._nodes = nodes
        self._here = folder / "here"
        self._addresses: dict[int, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Table:
        for index, streams in STREAM_ROWS.items():
            self._addresses[index] = self._nodes.start(index)
            with closing(GrpcReplayWriter(self._addresses[index], TABLE)) as writer:
                for env, count in enumerate(streams):
                    chunk = synthetic.rows(TABLE, StreamId(actor=index, env=env), 0, count)
                    writer.append([chunk], TIMEOUT)
        remotes = [RemoteShard(k, lambda k=k: self._addresses[k], TABLE) for k in STREAM_ROWS]
        self.reader = LocalReader(
            self._here,
            TABLE,
            batch=BATCH,
            length=LENGTH,
            context=0,
            seed=0,
            limiter=RateLimiter(1e9, 1, 1 << 40, 1),
            controls=[],
            remotes=remotes,
        )
        self._stack.callback(self.reader.close)
        self._until(lambda: self._live() == self._rows(STREAM_ROWS))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def lose_node(self, index: int, *, silent: bool = False) -> Outage:
        """Kill a node (or cut it off) while batches are drawn, draw on, bring it back, draw on."""
        p_before, before = self._uniformity(*STREAM_ROWS)
        others = [k for k in STREAM_ROWS if k != index]
        begun = last = time.monotonic()
        if silent:
            self._nodes.silence(index)
        else:
            self._nodes.kill(index)
        pause = 0.0
        while self._live() != self._rows(others):
            self.reader.sample(TIMEOUT)
            now = time.monotonic()
            pause, last = max(pause, now - last), now
            self._check(now - begun, f"shard {index} still has rows though its node is dead")
        noticed = time.monotonic() - begun
        self.reader.sample(TIMEOUT)  # goes on without it
        pause = max(pause, time.monotonic() - last)
        p_during, during = self._uniformity(*others)
        begun = time.monotonic()
        self._addresses[index] = self._nodes.start(index)
        listens = time.monotonic()
        self._until(lambda: self._live() == self._rows(STREAM_ROWS))
        returned = time.monotonic()
        p_after, after = self._uniformity(*STREAM_ROWS)
        return Outage(
            pause_seconds=pause,
            noticed_seconds=noticed,
            return_seconds=returned - begun,
            serve_seconds=returned - listens,
            p_before=p_before,
            p_during=p_during,
            p_after=p_after,
            p_shards=min(before, during, after),
        )

    def _uniformity(self, *shards: int) -> tuple[float, float]:
        """P that all legal starts of these shards are drawn alike, and that the shards are, by their starts.

        Raises: InfrastructureError for a start that is none of theirs.
        """
        legal = sorted(key for key in LEGAL if key[0] in shards)
        for _ in range(PLANNED):
            self.reader.sample(TIMEOUT)
        found: Counter[tuple[int, int, int]] = Counter()
        for _ in range(DRAWS):
            ids = self.reader.sample(TIMEOUT).ids
            found.update(zip(ids.shard.tolist(), ids.stream.tolist(), ids.start.tolist(), strict=True))
        if strange := found.keys() - set(legal):
            raise InfrastructureError(f"drawn though shards {shards} do not have them: {sorted(strange)[:5]}")
        starts = chance_of([found[key] for key in legal])
        drawn = [sum(n for key, n in found.items() if key[0] == shard) for shard in shards]
        share = [sum(key[0] == shard for key in legal) for shard in shards]
        expected = [sum(drawn) * part / sum(share) for part in share]
        return starts, chance_of(drawn, expected)

    def _live(self) -> int:
        return self.reader.counts()[1]

    def _rows(self, shards: Mapping[int, object] | list[int]) -> int:
        return sum(sum(STREAM_ROWS[shard]) for shard in shards)

    def _until(self, done: Callable[[], bool]) -> None:
        begun = time.monotonic()
        while not done():
            self._check(time.monotonic() - begun, f"{self._live()} rows can be drawn, others are missing")
            time.sleep(0.002)

    def _check(self, seconds: float, what: str) -> None:
        if seconds > TIMEOUT:
            raise InfrastructureError(f"{what} after {seconds:.0f} s; see the log of `replay.remote`")


def chance_of(found: Sequence[float], expected: Sequence[float] | None = None) -> float:
    """p-value of Pearson's chi-square test; all cells alike where nothing is expected."""
    counts = torch.tensor([float(n) for n in found], dtype=torch.float64)
    means = (
        counts.mean().expand_as(counts) if expected is None else torch.tensor(expected, dtype=torch.float64)
    )
    statistic = ((counts - means) ** 2 / means).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
