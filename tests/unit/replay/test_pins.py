"""Pins hold what a checkpoint saw, cost no data, and give everything back when pruned."""

import os
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from replay import layout, synthetic
from replay.cut import Cut, take_cut
from replay.limiter import RateLimiter
from replay.pins import HELD, PINS, PinStore, pins_of
from replay.reader import LocalReader
from replay.restore import TRASH, empty_trash, restore_exact
from replay.selection import Sampling
from replay.shard import ReplayShard
from replay.tiers import stages_of
from system.errors import IntegrityError, PreflightError
from system.experience import Chunk, Sequence, StreamId, WriteBack
from system.specs import TableSpec

TABLE = synthetic.vector_table()
WIDE = synthetic.vector_table(256)
CAPACITY = 2048


def open_shard(root: Path, index: int = 0, capacity: int = CAPACITY) -> ReplayShard:
    return ReplayShard(root, index, TABLE, capacity_rows=capacity, segment_rows=128)


def pinned(pins: PinStore, checkpoint: str) -> Cut:
    cut = pins.take(checkpoint)
    assert cut is not None
    return Cut.from_json(cut)


def insert(shard: ReplayShard, start: int, count: int, env: int = 0) -> None:
    shard.append([synthetic.rows(TABLE, StreamId(actor=0, env=env), start, count)], 10.0)


def make_reader(root: Path, pins: PinStore | None = None, table: TableSpec = TABLE) -> LocalReader:
    limiter = RateLimiter(train_ratio=1e6, prefill_rows=64, tolerance_rows=1 << 20, min_rows=16)
    return LocalReader(
        root,
        table,
        batch=4,
        length=8,
        context=1,
        seed=5,
        limiter=limiter,
        controls=[],
        sampling=Sampling(shares={"uniform": 1, "online": 1, "recency": 1, "prioritized": 1}),
        before_overwrite=pins.before if pins else None,
    )


def train(reader: LocalReader, updates: int) -> list[dict[str, np.ndarray]]:
    """Draw and overwrite latents by what they were and what was drawn; return copies of the batches."""
    batches = []
    for _ in range(updates):
        sequence = reader.sample(10.0)
        batches.append(copied(sequence))
        latent = np.asarray(sequence.columns["latent"], np.uint16)[:, 1:] * np.uint16(3) + np.uint16(7)
        priority = latent[:, :, 0].astype(np.float32)
        reader.write_back(
            WriteBack(ids=sequence.ids, offset=1, columns={"latent": latent}, priority=priority)
        )
    return batches


def copied(sequence: Sequence) -> dict[str, np.ndarray]:
    batch = {name: np.array(values) for name, values in sequence.columns.items()}
    return batch | {"ids/start": sequence.ids.start, "ids/stream": sequence.ids.stream}


def assert_same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(other)
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name} of batch {number}")


def disk(root: Path) -> int:
    """Bytes of the blocks under `root`, every inode once."""
    seen = {}
    for directory, _, files in os.walk(root):
        for name in files:
            about = os.lstat(os.path.join(directory, name))  # noqa: PTH118 (files vanish meanwhile)
            seen[about.st_ino] = about.st_blocks * 512
    return sum(seen.values())


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[PinStore]:
    with closing(PinStore(tmp_path, hold=True)) as store:
        yield store


def test_a_cut_counts_what_every_shard_ever_took(tmp_path: Path) -> None:
    with closing(open_shard(tmp_path)) as one, closing(open_shard(tmp_path, 1)) as other:
        insert(one, 0, 300)
        insert(other, 0, 5000)
        cut = take_cut(tmp_path)
    assert [cut.shards[i].inserted for i in (0, 1)] == [300, 5000]
    assert cut.inserted == 5300
    assert Cut.from_json(cut.to_json()) == cut


def test_pins_share_what_did_not_change(tmp_path: Path, pins: PinStore) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 1000)
        pins.take("000001-1")
        before = disk(tmp_path)
        entries = len(list((tmp_path / PINS / HELD).iterdir()))
        insert(shard, 1000, 10)
        pins.take("000002-2")
    assert len(list((tmp_path / PINS / HELD).iterdir())) == entries + 1
    assert disk(tmp_path) - before < 64 << 10  # the links' directories, and no rows


def test_a_pruned_pin_gives_its_space_back(tmp_path: Path) -> None:
    with closing(open_shard(tmp_path)) as shard:
        with closing(PinStore(tmp_path, hold=True)) as pins:
            insert(shard, 0, 2000)
            full = disk(tmp_path)
            for number in range(12):  # twelve times the capacity goes through
                pins.take(f"{number:06d}-{number}")
                pins.prune([f"{n:06d}-{n}" for n in (number, number - 1)])
                insert(shard, 2000 * (number + 1), 2000)
                assert disk(tmp_path) <= 4.5 * full  # live, two pins, one waiting to be deleted
            assert [pin.checkpoint for pin in pins_of(tmp_path)] == ["000010-10", "000011-11"]
            pins.prune(())
        assert not list((tmp_path / PINS / HELD).iterdir())
        assert disk(tmp_path) <= 1.5 * full
        names = {path.name for path in (tmp_path / PINS).iterdir()}
        assert len([name for name in names if name.endswith(".undo")]) <= 1


def test_exact_restore_brings_back_rows_and_latents_bit_for_bit(tmp_path: Path, pins: PinStore) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 1500)
        with closing(make_reader(tmp_path, pins)) as reader:
            train(reader, 10)
            state = deepcopy(reader.state())
            cut = pinned(pins, "000001-10")
            straight = train(reader, 10)
            insert(shard, 1500, 4000)  # everything of the cut is evicted
            train(reader, 10)
    restored = restore_exact(tmp_path, "000001-10", cut)
    assert restored.rows == 1500
    assert restored.removed == 4000
    assert restored.returned > 0
    assert restored.undone > 0
    with closing(open_shard(tmp_path)) as shard:
        assert shard.stats().inserted == 1500
        with closing(make_reader(tmp_path)) as reader:
            reader.load(state)
            assert_same(train(reader, 10), straight)
    empty_trash(tmp_path)
    assert not (tmp_path / TRASH).exists()


def test_new_rows_after_a_restore_neither_meet_old_ones_nor_the_pin(tmp_path: Path, pins: PinStore) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 300)  # ends inside a segment
        cut = pinned(pins, "000001-1")
        insert(shard, 300, 200)
    for _ in range(2):  # the pin serves again, and after rows were written behind it
        restore_exact(tmp_path, "000001-1", cut)
        with closing(open_shard(tmp_path)) as shard:
            assert shard.stats().inserted == 300
            shard.append(
                [synthetic.rows(TABLE, StreamId(actor=0, env=0), 0, 400, incarnation=shard.stats().epoch)],
                5.0,
            )
            assert shard.stats().inserted == 700
        with closing(make_reader(tmp_path)) as reader:
            train(reader, 5)


def test_a_restore_goes_back_past_a_newer_pin_and_past_a_save_that_failed(
    tmp_path: Path, pins: PinStore
) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 600)
        with closing(make_reader(tmp_path, pins)) as reader:
            state = deepcopy(reader.state())
            cut = pinned(pins, "000001-0")
            straight = train(reader, 6)
            pins.take("000002-6")  # its checkpoint was never published
            pins.prune(["000001-0"])
            train(reader, 6)
            pins.take("000002-12")
            train(reader, 6)
    restore_exact(tmp_path, "000001-0", cut)
    with closing(open_shard(tmp_path)), closing(make_reader(tmp_path)) as reader:
        reader.load(state)
        assert_same(train(reader, 6), straight)


def test_exact_without_pins_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 300)
        with closing(PinStore(tmp_path, hold=True)) as pins:
            cut = pinned(pins, "000001-1")
        with closing(PinStore(tmp_path, hold=False)) as released:
            assert pinned(released, "000002-2") == cut
    with pytest.raises(IntegrityError, match=r"replay\.resume=keep"):
        restore_exact(tmp_path, "000001-1", cut)


def test_a_damaged_ledger_only_postpones_a_pin(tmp_path: Path, pins: PinStore) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 300)
        wanted = take_cut(tmp_path)
        ledgers = {path: path.read_bytes() for path in (tmp_path / "shard-0000").glob("ledger*.json")}
        next(iter(ledgers)).write_text("{")
        assert take_cut(tmp_path) == wanted  # there are two
        for path in ledgers:
            path.write_text("{")
        with pytest.raises(PreflightError, match="is damaged"):
            pins.take("000001-1")
        with closing(PinStore(tmp_path, hold=False)) as looking:
            assert looking.take("000001-1") is None
        for path, text in ledgers.items():
            path.write_bytes(text)
        assert pinned(pins, "000001-1") == wanted


def test_a_restore_under_an_open_shard_is_refused(tmp_path: Path, pins: PinStore) -> None:
    with closing(open_shard(tmp_path)) as shard:
        insert(shard, 0, 300)
        cut = pinned(pins, "000001-1")
        with pytest.raises(PreflightError, match="owned by process"):
            restore_exact(tmp_path, "000001-1", cut)


def flat_rows(start: int, count: int) -> Chunk:
    """Rows whose wide column compresses."""
    chunk = synthetic.rows(WIDE, StreamId(actor=0, env=0), start, count)
    return Chunk(stream=chunk.stream, columns={**chunk.columns, "vector": np.zeros((count, 256), np.float32)})


def tiers_of(root: Path) -> set[str]:
    return {segment.tier for segment in layout.stored_segments(layout.shard_dir(root, 0))}


def open_tiered(root: Path, far: Path | None) -> ReplayShard:
    stages = stages_of(
        layout.shard_dir(root, 0), 0, WIDE, compress=True, cold_after=2,
        far=f"file://{far}" if far else None, far_after=4,
    )  # fmt: skip
    return ReplayShard(root, 0, WIDE, capacity_rows=CAPACITY, segment_rows=128, stages=stages)


def in_store(store: Path) -> set[str]:
    """Number and epoch of the segments of shard 0 that lie in a store."""
    files = (path.relative_to(store / "shard-0000") for path in store.rglob("*") if path.is_file())
    return {path.parts[0][5:19] for path in files if len(path.parts) > 1}


@pytest.mark.parametrize("far", [False, True], ids=["cold", "far"])
def test_a_pin_holds_segments_of_every_tier(tmp_path: Path, pins: PinStore, far: bool) -> None:
    store = tmp_path.with_name(f"{tmp_path.name}-store") if far else None
    if store is not None:
        store.mkdir()
    with closing(open_tiered(tmp_path, store)) as shard:
        shard.append([flat_rows(0, 1500)], 10.0)
        assert shard.settle(30.0)
        tiers = tiers_of(tmp_path)
        assert tiers == ({"raw", "cold", "far"} if far else {"raw", "cold"})
        with closing(make_reader(tmp_path, pins, WIDE)) as reader:
            assert reader.settle(10.0)
            train(reader, 6)
            state = deepcopy(reader.state())
            cut = pinned(pins, "000001-6")
            straight = train(reader, 6)
            shard.append([flat_rows(1500, 4000)], 10.0)
            assert shard.settle(30.0)
            train(reader, 6)
        away = {name[:14] for name in cut.shards[0].segments if name.endswith(".far.json")}
        assert bool(away) == far
        if store is not None:  # evicted here, deleted there as soon as no pin needs them
            assert away <= in_store(store)
    assert restore_exact(tmp_path, "000001-6", cut).returned == len(cut.shards[0].segments)
    assert tiers_of(tmp_path) == tiers
    with closing(ReplayShard(tmp_path, 0, WIDE, capacity_rows=CAPACITY, segment_rows=128)) as shard:
        assert shard.settle(30.0)
        with closing(make_reader(tmp_path, None, WIDE)) as reader:
            assert reader.settle(10.0)
            reader.load(state)
            assert_same(train(reader, 6), straight)
