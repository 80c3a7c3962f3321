"""What the three resume modes do to a replay before any shard of the run opens."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import assemble
from deploy.probe import probe_env
from deploy.resume import compare_replay, prepare_replay
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from learner.checkpoint import CheckpointStore
from replay import synthetic
from replay.pins import PinStore
from system.errors import ConfigError, IntegrityError
from system.experience import StreamId
from system.metrics import Metrics

ROWS = 700


class Run:
    """A run directory with one shard of rows, as a killed run leaves it."""

    def __init__(self, root: Path) -> None:
        self.dir = RunDirectory(root).create()
        self.env_spec = probe_env("toy:counter", {"image_side": 8})
        self.insert(0, ROWS)

    def config(self, mode: str) -> RunConfig:
        return RunConfig.model_validate(
            {
                "env": {"name": "toy:counter", "options": {"image_side": 8}},
                "actors": {"count": 1, "envs": 1},
                "replay": {"shards": 1, "capacity": 4096, "prefill": 64, "resume": mode},
                "learner": {"settings": {"size": "nano"}, "length": 8},
            }
        )

    def insert(self, start: int, count: int) -> None:
        config = self.config("keep")
        metrics = Metrics("t", "replay")
        shard = assemble.replay_shard(config, self.env_spec, str(self.dir.path), 0, metrics)
        with closing(shard):
            shard.grant(1 << 40)
            table = assemble.table_spec(config, self.env_spec)
            shard.append([synthetic.rows(table, StreamId(actor=0, env=0), start, count)], 10.0)

    def save(self, *, hold: bool) -> dict[str, object]:
        store = CheckpointStore(self.dir.checkpoints, keep=2)
        with closing(PinStore(self.dir.replay, hold=hold)) as pins:
            meta = {"signature": {}, "replay": pins.take(store.next_name(5))}
            store.save(5, {"progress": {}}, meta)
        return meta

    def inserted(self) -> tuple[int, int]:
        """(lifetime rows, live rows)."""
        metrics = Metrics("t", "replay")
        shard = assemble.replay_shard(self.config("keep"), self.env_spec, str(self.dir.path), 0, metrics)
        with closing(shard):
            return shard.stats().inserted, shard.stats().rows

    def last_event(self) -> dict[str, object]:
        return list(self.dir.events())[-1]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    yield run
    run.dir.release()


def test_keep_leaves_all_rows_and_counts_the_younger_ones(run: Run) -> None:
    meta = run.save(hold=False)
    run.insert(ROWS, 300)
    prepare_replay(run.config("keep"), run.env_spec, run.dir)
    assert run.inserted() == (1000, 1000)
    reader = SimpleNamespace()  # keep asks nothing of it
    assert compare_replay(run.config("keep"), run.dir, meta, reader, 2) == 300  # type: ignore[arg-type]
    assert (run.last_event()["event"], run.last_event()["younger_rows"]) == ("replay compared", 300)


def test_fresh_evicts_all_rows_and_counts_on(run: Run) -> None:
    prepare_replay(run.config("fresh"), run.env_spec, run.dir)
    assert run.inserted() == (ROWS, 0)
    assert run.last_event()["rows"] == ROWS
    run.insert(ROWS, 100)
    assert run.inserted() == (ROWS + 100, 100)


def test_exact_gives_up_what_the_checkpoint_did_not_see(run: Run) -> None:
    meta = run.save(hold=True)
    run.insert(ROWS, 300)
    prepare_replay(run.config("exact"), run.env_spec, run.dir)
    assert run.inserted() == (ROWS, ROWS)
    assert run.last_event()["removed_rows"] == 300
    config, metrics = run.config("exact"), Metrics("t", "learner")
    with closing(assemble.replay_reader(config, run.env_spec, str(run.dir.path), (), metrics)) as reader:
        assert compare_replay(config, run.dir, meta, reader, 1) == 0
        damaged = run.dir.replay / "shard-0000"
        damaged.rename(damaged.with_name("away"))
        with pytest.raises(IntegrityError, match="can be read"):
            compare_replay(config, run.dir, meta, reader, 1)
        compare_replay(config, run.dir, meta, reader, 2)  # a life inside a running run takes what there is


def test_exact_without_a_checkpoint_keeps_what_there_is(run: Run) -> None:
    prepare_replay(run.config("exact"), run.env_spec, run.dir)
    assert run.inserted() == (ROWS, ROWS)
    assert run.last_event()["event"] == "replay kept"


def test_exact_from_a_checkpoint_that_pinned_nothing_is_refused(run: Run) -> None:
    run.save(hold=False)
    with pytest.raises(IntegrityError, match=r"--set replay\.resume=keep"):
        prepare_replay(run.config("exact"), run.env_spec, run.dir)
    assert run.inserted() == (ROWS, ROWS)


def test_exact_with_a_shard_on_another_node_is_refused(run: Run) -> None:
    addresses = ("127.0.0.1:1", "127.0.0.1:2")  # there is no directory of shard 1 here
    metrics = Metrics("t", "learner")
    with pytest.raises(ConfigError, match=r"shard 1 is at 127\.0\.0\.1:2; set replay\.resume=keep"):
        assemble.replay_reader(run.config("exact"), run.env_spec, str(run.dir.path), addresses, metrics)
