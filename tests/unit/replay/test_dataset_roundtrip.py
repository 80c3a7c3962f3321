"""Tables out as datasets and back in as tables: every bit, from live shards too, whole or not at all."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from replay import synthetic
from replay.datasets.episodes import About, Episode, about_table
from replay.datasets.export import SINKS, export_dataset, open_files
from replay.datasets.ingest import import_dataset
from replay.datasets.table import HEADLESS, OPEN, TableEpisodes
from replay.datasets.whole import whole
from replay.shard import ReplayShard
from system.errors import ConfigError, PreflightError, SchemaError
from system.experience import Chunk, StreamId
from system.specs import ActionSpec, TableSpec

ACTIONS = ActionSpec(kind="discrete", classes=(3,))
TABLE = synthetic.vector_table()
FORMATS = ("npz", "zarr")


def chunk(stream: StreamId, start: int, count: int, *, length: int = 50) -> Chunk:
    """Synthetic rows in the row convention: the last row's action is zero."""
    made = synthetic.rows(TABLE, stream, start, count, episode_length=length)
    columns: dict[str, Any] = dict(made.columns)
    columns["action"] = np.where(columns["is_last"][:, None], np.int32(0), columns["action"])
    return Chunk(stream=stream, columns=columns)


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[ReplayShard]:
    """Three streams: episodes of 50 rows, of 7 rows, and one that is still running."""
    made = ReplayShard(tmp_path / "replay", 0, TABLE, capacity_rows=4096, segment_rows=256)
    made.append([chunk(StreamId(actor=0, env=0), 0, 200)], 5.0)
    made.append([chunk(StreamId(actor=0, env=1), 0, 70, length=7)], 5.0)
    made.append([chunk(StreamId(actor=1, env=0), 0, 75)], 5.0)
    yield made
    made.close()


def episodes(root: Path, **more: Any) -> list[Episode]:
    return list(TableEpisodes(root, "synthetic", ACTIONS, **more))


def assert_same(left: list[Episode], right: list[Episode]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.columns.keys() == b.columns.keys()
        for key, values in a.columns.items():
            assert values.dtype == b.columns[key].dtype, key
            assert values.shape == b.columns[key].shape, key
            assert values.tobytes() == b.columns[key].tobytes(), (a.name, key)


@pytest.mark.parametrize("form", FORMATS)
def test_a_table_comes_back_bit_for_bit(shard: ReplayShard, tmp_path: Path, form: Any) -> None:
    source = TableEpisodes(tmp_path / "replay", "synthetic", ACTIONS)
    exported = export_dataset(source, tmp_path / form, SINKS[form])
    found = open_files(tmp_path / form, {}, ())
    assert found is not None
    assert found.about == source.about
    imported = import_dataset(found, tmp_path / "again")
    assert exported.rows == imported.rows == 200 + 70 + 50
    original = episodes(tmp_path / "replay")
    assert_same(original, list(found))
    assert_same(original, episodes(tmp_path / "again"))
    terminal = [bool(e.columns["is_terminal"][-1]) for e in original]
    assert True in terminal
    assert False in terminal  # truncated ones, told apart


def test_a_live_table_is_read_while_it_grows(shard: ReplayShard, tmp_path: Path) -> None:
    source = TableEpisodes(tmp_path / "replay", "synthetic", ACTIONS)
    first = next(iter(source))
    shard.append([chunk(StreamId(actor=1, env=0), 75, 25)], 5.0)
    assert len(first) == 50
    assert len(episodes(tmp_path / "replay")) == 4 + 10 + 2


def test_a_table_larger_than_what_is_checked_at_once_comes_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.follow.AT_ONCE_NBYTES", 4096)
    made = ReplayShard(tmp_path / "r", 0, TABLE, capacity_rows=4096, segment_rows=256)
    made.append([chunk(StreamId(actor=0, env=0), 0, 3000)], 5.0)
    made.close()
    assert sum(map(len, episodes(tmp_path / "r"))) == 3000


def test_running_episodes_are_left_out_or_cut(shard: ReplayShard, tmp_path: Path) -> None:
    source = TableEpisodes(tmp_path / "replay", "synthetic", ACTIONS)
    whole_ones = list(source)
    assert source.tally.skipped == {OPEN: 25}
    cut = episodes(tmp_path / "replay", cut_open=True)
    assert len(cut) == len(whole_ones) + 1
    last = cut[-1].columns
    assert len(cut[-1]) == 25
    assert last["is_last"][-1]
    assert not last["is_terminal"][-1]
    assert not last["action"][-1].any()


def test_episodes_whose_beginning_was_evicted_are_left_out(tmp_path: Path) -> None:
    stream = StreamId(actor=0, env=0)
    made = ReplayShard(tmp_path / "r", 0, TABLE, capacity_rows=256, segment_rows=64)
    for start in range(0, 1000, 10):
        made.append([chunk(stream, start, 10)], 5.0)
    source = TableEpisodes(tmp_path / "r", "synthetic", ACTIONS)
    found = list(source)
    assert source.tally.skipped[HEADLESS] > 0
    assert [len(e) for e in found] == [50] * len(found)
    assert sum(map(len, found)) + sum(source.tally.skipped.values()) == source.rows
    made.close()


def test_any_zarr_reader_opens_the_flat_group(shard: ReplayShard, tmp_path: Path) -> None:
    source = TableEpisodes(tmp_path / "replay", "synthetic", ACTIONS)
    export_dataset(source, tmp_path / "flat", SINKS["zarr"])
    vectors = np.concatenate([e.columns["vector"] for e in source])
    group = zarr.open_group(tmp_path / "flat", mode="r")
    stored: Any = group["vector"]
    assert np.array_equal(stored[:], vectors)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "flat" / "vector")}}
    assert np.array_equal(tensorstore.open(spec).result().read().result(), vectors)
    starts: Any = group["episode_start"]
    lengths: Any = group["episode_length"]
    assert int(lengths[:].sum()) == len(vectors)
    assert starts[1] == lengths[0]


def test_many_chunks_and_windows_keep_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.datasets.flat_zarr.MAX_CHUNK_ROWS", 37)
    monkeypatch.setattr("replay.datasets.table.MAX_BLOCK_ROWS", 23)
    made = ReplayShard(tmp_path / "r", 0, TABLE, capacity_rows=4096)
    made.append([chunk(StreamId(actor=0, env=0), 0, 500)], 5.0)
    source = TableEpisodes(tmp_path / "r", "synthetic", ACTIONS)
    export_dataset(source, tmp_path / "flat", SINKS["zarr"])
    found = open_files(tmp_path / "flat", {}, ())
    assert found is not None
    assert_same(list(source), list(found))
    made.close()


def test_nothing_is_overwritten_and_no_empty_dataset_appears(shard: ReplayShard, tmp_path: Path) -> None:
    source = TableEpisodes(tmp_path / "replay", "synthetic", ACTIONS)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        export_dataset(source, tmp_path / "there", SINKS["npz"])
    empty = ReplayShard(tmp_path / "empty", 0, TABLE, capacity_rows=256)
    with pytest.raises(SchemaError, match="no whole episode"):
        export_dataset(TableEpisodes(tmp_path / "empty", "e", ACTIONS), tmp_path / "none", SINKS["npz"])
    empty.close()
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_a_failing_import_leaves_nothing(tmp_path: Path) -> None:
    class Breaks:
        about: About = about_table("b", TableSpec.of_rows(TABLE_OBS, ACTIONS), ACTIONS)
        rows = 100

        def __iter__(self) -> Iterator[Episode]:
            yield Episode(name="good", columns=bare(10))
            raise OSError(28, "No space left on device")

    with pytest.raises(PreflightError, match="No space left"):
        import_dataset(Breaks(), tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


TABLE_OBS = {key: TABLE.columns[key] for key in ("vector", "direction")}


def bare(rows: int) -> dict[str, Any]:
    made = synthetic.rows(TABLE, StreamId(actor=0, env=0), 0, rows, episode_length=rows)
    return {
        key: made.columns[key]
        for key in made.columns
        if key not in ("incarnation", "episode", "step", "latent")
    }


def _write_and_die(path: Path) -> None:
    with whole(path) as draft:
        (draft / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_export_leaves_no_half_thing_and_the_next_one_clears_it(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path / "d",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "d").exists()
    assert [p.name for p in tmp_path.iterdir()] == [".d.partial"]
    with whole(tmp_path / "d") as draft:
        assert list(draft.iterdir()) == []
        with pytest.raises(ConfigError, match="another process"), whole(tmp_path / "d"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
