"""Rows of an older schema under a newer one: defaults, ignored columns, refusals, migration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay import cold, layout, synthetic
from replay.datasets.migrate import migrate
from replay.datasets.table import TableEpisodes
from replay.evolve import ForeignHome
from replay.offline import OfflineLedger
from replay.raw import MappedSegment
from replay.reader import LocalReader
from replay.rows import RowViews
from replay.schema import obstacles
from replay.segment import Segment
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import ConfigError, RejectedError, SchemaError
from system.experience import Chunk, StreamId
from system.specs import ActionSpec, ArraySpec, TableSpec

OLD = synthetic.vector_table()
STREAM = StreamId(actor=2, env=1)
WIDE = ArraySpec(shape=(100,), dtype="float32", default=0.25)  # beyond what is copied as bytes
SCALAR = ArraySpec(shape=(), dtype="int32", default=7)


def with_columns(table: TableSpec, **more: ArraySpec) -> TableSpec:
    return TableSpec(columns={**table.columns, **more}, overlay=table.overlay)


def without(table: TableSpec, *names: str) -> TableSpec:
    return TableSpec(
        columns={k: v for k, v in table.columns.items() if k not in names}, overlay=table.overlay
    )


def filled(root: Path, table: TableSpec = OLD, rows: int = 150) -> Chunk:
    shard = ReplayShard(root, 0, table, capacity_rows=1024)
    chunk = synthetic.rows(table, STREAM, 0, rows)
    shard.append([chunk], 5.0)
    shard.close()
    return chunk


def read(root: Path, wanted: TableSpec, rows: int) -> dict[str, Any]:
    view = TableView(root, wanted, 1, foreign=True)
    assert view.settle(30.0)
    ((_, runs),) = view.index.streams.items()
    made = {k: np.full((rows + 3, *s.shape), 1, s.dtype) for k, s in wanted.all.items()}
    target = RowViews(made)
    for _ in range(2):  # the second time through the picked columns kept from the first
        at = 3
        for piece in runs.pieces(0, rows):
            piece.home.copy_rows(target, at, piece.first, piece.rows)
            at += piece.rows
    view.release()
    return {key: values[3:] for key, values in made.items()}


def test_added_columns_read_as_their_defaults_and_removed_ones_are_ignored(tmp_path: Path) -> None:
    chunk = filled(tmp_path)
    wanted = with_columns(without(OLD, "direction"), wide=WIDE, mood=SCALAR)
    found = read(tmp_path, wanted, len(chunk))
    assert (found["wide"] == np.float32(0.25)).all()
    assert (found["mood"] == 7).all()
    for key in ("vector", "action", "reward", "is_first", "step"):
        assert np.array_equal(found[key], chunk.columns[key]), key


def test_overlays_of_another_run_read_as_zeros_and_are_never_written(tmp_path: Path) -> None:
    chunk = filled(tmp_path)
    assert chunk.columns["latent"].any()
    assert not read(tmp_path, OLD, len(chunk))["latent"].any()
    view = TableView(tmp_path, OLD, 1, foreign=True)
    ((_, runs),) = view.index.streams.items()
    piece = next(runs.pieces(0, 4))
    assert piece.home.write_overlay("latent", piece.first, np.ones((4, 2), np.uint16)) == 0
    view.release()


def test_other_overlay_columns_are_no_obstacle(tmp_path: Path) -> None:
    filled(tmp_path)
    other = TableSpec(columns=OLD.columns, overlay={"latent": ArraySpec(shape=(9,), dtype="float32")})
    assert not read(tmp_path, other, 10)["latent"].any()


def test_a_column_without_default_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    wanted = with_columns(OLD, wide=replace(WIDE, default=None))
    with pytest.raises(SchemaError, match=r"column wide not stored.*with `--set replay.defaults.wide=0`"):
        TableView(tmp_path, wanted, 1, foreign=True)


def test_another_dtype_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    filled(tmp_path / "old")
    wanted = with_columns(OLD, vector=ArraySpec(shape=(4,), dtype="float16"))
    with pytest.raises(SchemaError) as refused:
        TableView(tmp_path / "old", wanted, 1, foreign=True)
    assert f"dreamfleet replay migrate {tmp_path / 'old'} NEW --cast vector=float16" in str(refused.value)
    migrate(tmp_path / "old", tmp_path / "new", {"vector": "float16"})
    view = TableView(tmp_path / "new", wanted, 1)
    assert view.settle(30.0)
    assert view.index.rows == 150
    view.release()


def test_fewer_classes_on_disk_are_readable_and_more_are_not() -> None:
    more = with_columns(OLD, direction=replace(OLD.columns["direction"], classes=5))
    assert not list(obstacles(OLD, more))
    assert [name for name, _ in obstacles(more, OLD)] == ["direction"]


def test_a_writer_is_not_given_another_schema(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(SchemaError, match="wide"):
        ReplayShard(tmp_path, 0, with_columns(OLD, wide=WIDE), capacity_rows=1024)


def test_a_migrated_table_keeps_identities_and_can_be_continued(tmp_path: Path) -> None:
    chunk = filled(tmp_path / "old", rows=130)
    tally = migrate(tmp_path / "old", tmp_path / "new", {"vector": "float16"}, ["direction"])
    assert tally.rows == 130
    table, _ = layout.read_table(tmp_path / "new")
    assert "direction" not in table.columns
    shard = ReplayShard(tmp_path / "new", 0, table, capacity_rows=1024)
    again = {k: v for k, v in chunk.columns.items() if k != "direction"}
    again["vector"] = again["vector"].astype(np.float16)
    assert shard.append([Chunk(stream=STREAM, columns=again)], 5.0).duplicates == 130
    shard.close()
    action = ActionSpec(kind="discrete", classes=(3,))
    (first, *_) = TableEpisodes(tmp_path / "new", "new", action)
    assert np.array_equal(first.columns["vector"], chunk.columns["vector"][:50].astype(np.float16))


def test_streams_of_several_incarnations_migrate(tmp_path: Path) -> None:
    shard = ReplayShard(tmp_path / "old", 0, OLD, capacity_rows=2048)
    for incarnation in (1, 2):
        for env in (0, 1):
            stream = StreamId(actor=0, env=env)
            shard.append([synthetic.rows(OLD, stream, 0, 70, incarnation=incarnation)], 5.0)
    shard.close()
    assert migrate(tmp_path / "old", tmp_path / "new", {}).rows == 280


def test_what_a_dtype_cannot_hold_is_refused_and_nothing_appears(tmp_path: Path) -> None:
    filled(tmp_path / "old")
    table = without(OLD, "vector")
    big = with_columns(table, counts=ArraySpec(shape=(2,), dtype="float32"))
    shard = ReplayShard(tmp_path / "big", 0, big, capacity_rows=1024)
    made = dict(synthetic.rows(big, STREAM, 0, 20).columns)
    made["counts"] = np.full((20, 2), 1e9, np.float32)
    shard.append([Chunk(stream=STREAM, columns=made)], 5.0)
    shard.close()
    with pytest.raises(RejectedError, match="counts spans"):
        migrate(tmp_path / "big", tmp_path / "new", {"counts": "uint8"})
    with pytest.raises(RejectedError, match="NaN or infinity"):
        migrate(tmp_path / "big", tmp_path / "new", {"counts": "float16"})
    with pytest.raises(ConfigError, match="not in the table"):
        migrate(tmp_path / "old", tmp_path / "new", {"nothing": "uint8"})
    with pytest.raises(ConfigError, match="belong to every row"):
        migrate(tmp_path / "old", tmp_path / "new", {}, ["reward"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "old"]


def test_labelled_and_action_free_rows_share_a_batch_behind_a_mask(tmp_path: Path) -> None:
    filled(tmp_path / "own", rows=400)
    obs = {k: OLD.columns[k] for k in ("vector", "direction")}
    video = TableSpec.of_rows(obs, None)
    filled(tmp_path / "video", video, rows=400)
    mixed = TableSpec.of_rows(obs, ActionSpec(kind="discrete", classes=(3,)), action_mask=True)
    shard = ReplayShard(tmp_path / "mixed", 0, mixed, capacity_rows=1024)
    made = dict(synthetic.rows(mixed, STREAM, 0, 400).columns)
    made["action_mask"] = made["step"] % 2 == 0
    shard.append([Chunk(stream=STREAM, columns=made)], 5.0)
    shard.close()
    reader = LocalReader(
        tmp_path / "own",
        OLD,
        batch=30,
        length=8,
        context=1,
        seed=0,
        limiter=OfflineLedger(),
        controls=[],
        sources={"video": (tmp_path / "video", 1.0), "mixed": (tmp_path / "mixed", 1.0)},
    )
    assert reader.settle(30.0)
    sequence = reader.sample(5.0)
    mask, source = sequence.columns["action_mask"], sequence.source
    assert source is not None
    assert mask.dtype == np.bool_
    assert mask.shape == (30, 9)
    assert set(source.tolist()) == {0, 1, 2}
    assert mask[source == 0].all()
    assert not mask[source == 1].any()
    assert not sequence.columns["action"][source == 1].any()
    assert np.array_equal(mask[source == 2], sequence.columns["step"][source == 2] % 2 == 0)
    assert sequence.columns["latent"][source == 0].any()
    assert not sequence.columns["latent"][source != 0].any()
    reader.close()


def test_a_table_without_need_has_no_mask(tmp_path: Path) -> None:
    filled(tmp_path / "own", rows=200)
    filled(tmp_path / "more", rows=200)
    reader = LocalReader(
        tmp_path / "own", OLD, batch=4, length=8, context=1, seed=0, limiter=OfflineLedger(), controls=[],
        sources={"more": (tmp_path / "more", 1.0)}, own_weight=0.0,
    )  # fmt: skip
    assert reader.settle(30.0)
    sequence = reader.sample(5.0)
    assert "action_mask" not in sequence.columns
    assert sequence.source is not None
    assert sequence.source.tolist() == [1] * 4
    reader.close()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source video .*must hold a table\.json"):
        LocalReader(
            tmp_path / "own", OLD, batch=4, length=8, context=1, seed=0, limiter=OfflineLedger(), controls=[],
            sources={"video": (tmp_path / "nowhere", 1.0)},
        )  # fmt: skip


def test_compressed_segments_are_read_under_a_newer_schema_too(
    tmp_path: Path, sealed_segment: Callable[..., Segment], make_cold: Callable[..., Path]
) -> None:
    table = synthetic.image_table(16)
    directory = layout.shard_dir(tmp_path, 0)
    segment = sealed_segment(directory)
    raw, packed = MappedSegment(segment), cold.ColdSegment(make_cold(directory, segment), table)
    wanted = with_columns(without(table, "vector"), wide=WIDE, mood=SCALAR)
    found: list[dict[str, Any]] = []
    for home in (raw, packed):
        made = {k: np.zeros((200, *s.shape), s.dtype) for k, s in wanted.all.items()}
        ForeignHome(home, table, wanted).copy_rows(RowViews(made), 7, 30, 150)
        found.append(made)
    for key, values in found[0].items():
        assert np.array_equal(values, found[1][key]), key
    assert np.array_equal(found[1]["image"][7:157], segment.columns["image"][0, 30:180])
    assert (found[1]["wide"][7:157] == np.float32(0.25)).all()
