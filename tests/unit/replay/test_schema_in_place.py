"""A table that goes on under another schema: old rows keep theirs, new ones have the new one, one reader."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from replay import layout, synthetic
from replay.audit import audit_replay
from replay.datasets.migrate import migrate
from replay.inventory import repair_replay, verify_replay
from replay.offline import OfflineLedger
from replay.reader import LocalReader
from replay.remote import RemoteShard
from replay.service import serve_shard
from replay.shard import ReplayShard
from replay.tiers import stages_of
from replay.view import TableView
from system.errors import IntegrityError, SchemaError
from system.experience import Chunk, StreamId, WriteBack
from system.specs import ArraySpec, TableSpec

OLD = synthetic.vector_table()
GOAL = ArraySpec(shape=(3,), dtype="float32", default=-2.0)
NEW = TableSpec(columns={**OLD.columns, "goal": GOAL}, overlay=OLD.overlay)
IMAGES = synthetic.image_table(16)
ROWS = 300
STREAM = StreamId(actor=0, env=0)


def shard_of(
    root: Path, table: TableSpec, index: int = 0, *, evolve: bool = False, far: str | None = None
) -> ReplayShard:
    directory = layout.shard_dir(root, index)
    stages = stages_of(directory, index, table, compress=True, cold_after=1, far=far, far_after=2)
    return ReplayShard(
        root, index, table, capacity_rows=4096, segment_rows=256, evolve=evolve, stages=stages if far else ()
    )


def chunk_of(table: TableSpec, start: int, count: int, stream: StreamId = STREAM) -> Chunk:
    columns = dict(synthetic.rows(table, stream, start, count).columns)
    if "image" in columns:  # shrinks
        columns["image"] = np.zeros_like(columns["image"]) + (np.arange(start, start + count) % 251).astype(
            np.uint8
        ).reshape(-1, 1, 1, 1)
    if "goal" in columns:
        columns["goal"] = np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 3, axis=1)
    return Chunk(stream=stream, columns=columns)


def fill(root: Path, table: TableSpec, start: int = 0, count: int = ROWS, *, evolve: bool = False) -> None:
    shard = shard_of(root, table, evolve=evolve)
    assert shard.append([chunk_of(table, start, count)], 5.0).committed == count
    assert shard.settle(30.0)
    shard.close()


def evolved(root: Path) -> Path:
    """ROWS old rows, and as many of the same stream under the new schema."""
    fill(root, OLD)
    fill(root, NEW, ROWS, evolve=True)
    return root


def reader_of(root: Path, table: TableSpec = NEW, **more: object) -> LocalReader:
    return LocalReader(
        root, table, batch=64, length=8, context=0, seed=1, limiter=OfflineLedger(), controls=[], **more
    )  # type: ignore[arg-type]


def check_batches(reader: LocalReader) -> None:
    """Old rows have the default, new ones what was stored; positions tell which is which."""
    kinds = set()
    for _ in range(4):
        sequence = reader.sample(5.0)
        positions = sequence.ids.start[:, None] + np.arange(8)  # [B, T]
        goal, old = sequence.columns["goal"], positions < ROWS
        assert (goal[old] == -2.0).all()
        assert np.array_equal(goal[~old], np.repeat(positions[~old][:, None], 3, axis=1).astype(np.float32))
        wanted = chunk_of(OLD, 0, 2 * ROWS).columns["vector"]
        assert np.array_equal(sequence.columns["vector"], wanted[positions])
        kinds |= set(old.any(axis=1).tolist())
    assert kinds == {True, False}


def test_one_batch_has_defaults_for_old_rows_and_true_values_for_new_ones(tmp_path: Path) -> None:
    evolved(tmp_path)
    reader = reader_of(tmp_path)
    assert reader.settle(30.0)
    check_batches(reader)
    sequence = reader.sample(5.0)
    latents = {"latent": np.full((64, 8, 2), 9, np.uint16)}
    reader.write_back(WriteBack(ids=sequence.ids, offset=0, columns=latents))
    assert not reader.dropped_write_backs
    reader.close()


def test_old_segments_become_cold_and_far_under_their_own_schema(tmp_path: Path) -> None:
    fill(tmp_path / "r", IMAGES, 0, 256)
    fill(tmp_path / "r", IMAGES, 256, ROWS - 256)
    table = TableSpec(columns={**IMAGES.columns, "goal": GOAL}, overlay=IMAGES.overlay)
    shard = shard_of(tmp_path / "r", table, evolve=True, far=f"file://{tmp_path / 'store'}")
    for start in range(ROWS, 2 * ROWS, 50):
        shard.append([chunk_of(table, start, 50)], 5.0)
    shard.append([chunk_of(table, start, 10, StreamId(actor=0, env=1)) for start in range(0, 300, 10)], 5.0)
    assert shard.settle(60.0)
    stored = layout.stored_segments(layout.shard_dir(tmp_path / "r", 0))
    tiers = [(one.number, one.tier) for one in stored]
    shard.close()
    assert {tier for _, tier in tiers[:2]} == {"cold", "far"}, tiers
    reader = reader_of(tmp_path / "r", table)
    assert reader.settle(30.0)
    assert reader.counts()[1] == 2 * ROWS + 300
    check_tiers(reader, ROWS)
    reader.close()
    assert verify_replay(tmp_path / "r") == (2 * ROWS + 300, [])


def check_tiers(reader: LocalReader, evolved_at: int) -> None:
    for _ in range(4):
        sequence = reader.sample(10.0)
        own = sequence.ids.stream == 0
        positions = (sequence.ids.start[:, None] + np.arange(8))[own]  # [b, T]
        goal = sequence.columns["goal"][own]
        assert (goal[positions < evolved_at] == -2.0).all()
        assert (goal[positions >= evolved_at] >= evolved_at).all()
        assert (sequence.columns["image"][own][..., 0, 0, 0] == positions % 251).all()


def test_streams_go_on_where_they_were(tmp_path: Path) -> None:
    evolved(tmp_path)
    shard = shard_of(tmp_path, NEW)
    assert shard.append([chunk_of(NEW, ROWS, ROWS)], 5.0).duplicates == ROWS
    assert shard.stats().inserted == shard.stats().rows == 2 * ROWS
    assert not shard.lost_rows
    shard.clear()
    assert shard.stats().evicted == 2 * ROWS
    shard.close()


def test_nothing_evolves_unasked(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    before = (tmp_path / "table.json").read_bytes()
    for opening in (lambda: shard_of(tmp_path, NEW), lambda: TableView(tmp_path, NEW, 8)):
        with pytest.raises(SchemaError, match=r"adds goal.*replay\.evolve=true"):
            opening()
    assert (tmp_path / "table.json").read_bytes() == before


def test_a_column_without_a_default_is_refused_with_the_setting_that_gives_one(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    bare = TableSpec(columns={**NEW.columns, "goal": replace(GOAL, default=None)}, overlay=OLD.overlay)
    with pytest.raises(SchemaError, match=r"--set replay\.evolve=true --set replay\.defaults\.goal=0"):
        shard_of(tmp_path, bare, evolve=True)
    fill(tmp_path, NEW, ROWS, evolve=True)
    assert bare.digest == NEW.digest
    reader = reader_of(tmp_path, bare)  # the default was said once
    assert reader.settle(30.0)
    check_batches(reader)
    reader.close()


def test_another_dtype_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    fill(tmp_path / "old", OLD)
    half = TableSpec(
        columns={**OLD.columns, "vector": ArraySpec(shape=(4,), dtype="float16")}, overlay=OLD.overlay
    )
    with pytest.raises(SchemaError) as refused:
        shard_of(tmp_path / "old", half, evolve=True)
    assert f"dreamfleet replay migrate {tmp_path / 'old'} NEW --cast vector=float16" in str(refused.value)
    migrate(tmp_path / "old", tmp_path / "new", {"vector": "float16"})
    shard = shard_of(tmp_path / "new", half)
    assert shard.stats().rows == ROWS
    shard.close()


def test_the_old_schema_is_refused_afterwards_unless_asked_for(tmp_path: Path) -> None:
    evolved(tmp_path)
    with pytest.raises(SchemaError, match="has gone on since; lacks goal"):
        shard_of(tmp_path, OLD)
    fill(tmp_path, OLD, 2 * ROWS, evolve=True)
    history = layout.read_history(tmp_path)
    assert [table.digest for table in history.tables] == [OLD.digest, NEW.digest]
    view = TableView(tmp_path, OLD, 1)
    assert view.settle(30.0)
    assert view.index.rows == 3 * ROWS
    view.release()
    shard_of(tmp_path, NEW, evolve=True).close()  # and back: rows without a goal have the default
    assert layout.read_history(tmp_path).table.columns["goal"].default == -2.0


def test_dropped_columns_stay_on_disk(tmp_path: Path) -> None:
    less = TableSpec(columns={k: v for k, v in OLD.columns.items() if k != "direction"}, overlay=OLD.overlay)
    fill(tmp_path, OLD)
    fill(tmp_path, less, ROWS, evolve=True)
    view = TableView(tmp_path, less, 1)
    assert view.settle(30.0)
    assert view.index.rows == 2 * ROWS
    view.release()
    assert verify_replay(tmp_path) == (2 * ROWS, [])
    with pytest.raises(SchemaError, match=r"direction not stored"):  # rows of `less` have none
        TableView(tmp_path, OLD, 1, evolve=True)


def test_overlays_of_another_shape_begin_as_zeros_in_old_rows(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    wide = TableSpec(columns=OLD.columns, overlay={"latent": ArraySpec(shape=(5,), dtype="float32")})
    fill(tmp_path, wide, ROWS, evolve=True)
    reader = reader_of(tmp_path, wide)
    assert reader.settle(30.0)
    sequence = reader.sample(5.0)
    old = sequence.ids.start[:, None] + np.arange(8) < ROWS
    assert not sequence.columns["latent"][old].any()
    assert sequence.columns["latent"][~old].any()
    reader.write_back(
        WriteBack(ids=sequence.ids, offset=0, columns={"latent": np.ones((64, 8, 5), np.float32)})
    )
    reader.close()


def test_a_kill_before_the_first_new_segment_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    layout.open_table(tmp_path, NEW, evolve=True)  # and no segment follows
    view = TableView(tmp_path, NEW, 1)
    assert view.settle(30.0)
    assert view.index.rows == ROWS
    view.release()
    fill(tmp_path, NEW, ROWS)  # needs no asking any more
    assert audit_replay(tmp_path).findings == ()


def test_a_growing_segment_of_the_old_schema_is_sealed_by_the_next_owner(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, OLD)
    shard.append([chunk_of(OLD, 0, 40)], 5.0)
    shard.close()
    shard = shard_of(tmp_path, NEW, evolve=True)
    shard.append([chunk_of(NEW, 40, 40)], 5.0)
    assert shard.settle(30.0)
    assert [stored.number for stored in shard.sealed()] == [0]
    assert shard.stats().rows == 80
    shard.close()


def test_shards_that_open_at_once_agree(tmp_path: Path) -> None:
    for index in range(4):
        shard = shard_of(tmp_path, OLD, index)
        shard.append([chunk_of(OLD, 0, 10, StreamId(actor=index, env=0))], 5.0)
        shard.close()
    shards: list[ReplayShard] = []
    threads = [
        threading.Thread(target=lambda i=i: shards.append(shard_of(tmp_path, NEW, i, evolve=True)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shards) == 4
    assert [t.digest for t in layout.read_history(tmp_path).tables] == [NEW.digest, OLD.digest]
    for shard in shards:
        shard.close()


def test_rows_of_both_schemas_pass_verify_audit_and_repair(tmp_path: Path) -> None:
    evolved(tmp_path)
    assert verify_replay(tmp_path) == (2 * ROWS, [])
    books = audit_replay(tmp_path)
    assert (books.live, books.findings) == (2 * ROWS, ())
    repaired = repair_replay(tmp_path)
    assert (repaired.rows, repaired.lost, repaired.findings) == (2 * ROWS, 0, ())


def test_segments_of_both_schemas_move_to_another_shard(tmp_path: Path) -> None:
    evolved(tmp_path)
    source, target = shard_of(tmp_path, NEW), shard_of(tmp_path, NEW, 1)
    assert source.settle(30.0)
    assert sum(target.adopt(stored.path) for stored in source.sealed()) == 2 * ROWS
    source.close()
    target.close()
    shard = shard_of(tmp_path, NEW, 1)
    assert shard.stats().rows == 2 * ROWS
    shard.close()


def test_a_reader_that_was_there_before_leaves_out_what_it_cannot_know(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    view = TableView(tmp_path, OLD, 1)
    assert view.settle(30.0)
    fill(tmp_path, NEW, ROWS, evolve=True)
    assert view.settle(30.0)
    assert view.index.rows == 2 * ROWS  # it reads them without the goal
    view.release()


def test_another_run_reads_both_as_a_source(tmp_path: Path) -> None:
    evolved(tmp_path / "source")
    fill(tmp_path / "own", NEW)
    reader = reader_of(tmp_path / "own", sources={"source": (tmp_path / "source", 1.0)}, own_weight=0.0)
    assert reader.settle(30.0)
    check_batches(reader)
    reader.close()


def test_a_shard_serves_both_to_other_nodes(tmp_path: Path) -> None:
    evolved(tmp_path / "node")
    shard = shard_of(tmp_path / "node", NEW)
    server = serve_shard(shard, "127.0.0.1:0")
    remote = RemoteShard(0, server.address, NEW, poll_seconds=0.01)
    reader = reader_of(tmp_path / "learner", remotes=[remote])
    try:
        tick, waited = threading.Event(), 0
        while reader.counts()[1] < 2 * ROWS and waited < 1000:
            tick.wait(0.02)
            waited += 1
        check_batches(reader)
    finally:
        reader.close()
        server.stop(0)
        shard.close()


def table_value(root: Path) -> dict:
    return json.loads((root / "table.json").read_text())


def cut_off(root: Path) -> None:
    text = (root / "table.json").read_text()
    (root / "table.json").write_text(text[: len(text) // 2])


def change(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        value = table_value(root)
        edit(value)
        (root / "table.json").write_text(json.dumps(value))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        change(lambda v: v.pop("former")),
        change(lambda v: v.pop("check")),
        change(lambda v: v.update(former=[])),
        change(lambda v: v.update(former=3)),
        change(lambda v: v["former"][0].update(digest="0" * 64)),
        change(lambda v: v["former"][0]["table"]["columns"]["vector"].update(dtype="int32")),
        change(lambda v: v["table"]["columns"]["goal"].update(default=5.0)),
        change(lambda v: v.update(replay="0" * 16)),
    ],
)
def test_damage_to_the_history_is_found_and_mended_from_the_segments(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    evolved(tmp_path)
    sound = table_value(tmp_path)
    damage(tmp_path)
    with pytest.raises(IntegrityError, match=r"table\.json"):
        shard_of(tmp_path, NEW)
    rows, findings = verify_replay(tmp_path)
    assert (rows, [finding.reason for finding in findings]) == (2 * ROWS, ["table"])
    assert repair_replay(tmp_path).rows == 2 * ROWS
    assert table_value(tmp_path) == sound


def test_a_lost_table_json_is_made_again_with_its_history(tmp_path: Path) -> None:
    evolved(tmp_path)
    sound = table_value(tmp_path)
    (tmp_path / "table.json").unlink()
    shard = shard_of(tmp_path, NEW)
    assert shard.stats().rows == 2 * ROWS
    shard.close()
    assert table_value(tmp_path) == sound


def test_a_segment_of_an_unknown_schema_reaches_no_batch(tmp_path: Path) -> None:
    fill(tmp_path / "a", OLD)
    fill(tmp_path / "b", NEW)
    theirs = layout.stored_segments(layout.shard_dir(tmp_path / "b", 0))[0].path
    here = layout.shard_dir(tmp_path / "a", 0) / "00000009-e0001.zarr"
    theirs.rename(here)
    view = TableView(tmp_path / "a", OLD, 1)
    assert view.settle(30.0)
    assert view.index.rows == ROWS
    view.release()
    shard = shard_of(tmp_path / "a", OLD)
    assert shard.stats().rows == ROWS
    assert not here.exists()
    shard.close()
