import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from replay import follow, layout, synthetic
from replay.ledger import write_ledger
from replay.limiter import RateLimiter
from replay.raw import MappedSegment
from replay.reader import LocalReader
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import ConfigError, DeadlineError, RejectedError
from system.experience import Chunk, StreamId
from system.metrics import Metrics

TABLE = synthetic.vector_table()


def rows(start: int, count: int, *, actor: int = 0, env: int = 0, incarnation: int = 0) -> Chunk:
    return synthetic.rows(TABLE, StreamId(actor=actor, env=env), start, count, incarnation=incarnation)


def open_shard(root: Path, index: int = 0, capacity_rows: int = 1024, **changes: int) -> ReplayShard:
    return ReplayShard(root, index, TABLE, capacity_rows=capacity_rows, **changes)


def open_reader(root: Path, shards: list[ReplayShard], **changes: object) -> LocalReader:
    base = {"batch": 4, "length": 8, "context": 1, "seed": 0, "limiter": RateLimiter(1000.0, 0, 10**6, 1)}
    return LocalReader(root, TABLE, controls=shards, **base | changes)


def test_rows_wait_for_credit_and_go_in_as_soon_as_it_comes(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, initial_grant=30)
    done = threading.Event()

    def send() -> None:
        shard.append([rows(0, 80)], 20.0)
        done.set()

    sender = threading.Thread(target=send)
    sender.start()
    while shard.stats().waiting != 50:
        pass
    assert shard.stats().inserted == 30
    shard.grant(60)
    while shard.stats().waiting != 20:
        pass
    assert shard.stats().inserted == 60
    assert not done.is_set()
    shard.grant(80)
    sender.join()
    assert shard.stats().inserted == 80
    assert shard.stats().wait_seconds > 0
    shard.close()


def test_unused_credit_can_be_taken_back(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, initial_grant=100)
    shard.grant(10)
    with pytest.raises(DeadlineError, match="10 granted"):
        shard.append([rows(0, 20)], 0.0)
    assert shard.stats().inserted == 10
    shard.close()


def test_closing_wakes_waiting_appends(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, initial_grant=0)
    errors: list[Exception] = []

    def send() -> None:
        try:
            shard.append([rows(0, 5)], 60.0)
        except DeadlineError as error:
            errors.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    while not shard.stats().waiting:
        pass
    shard.close()
    sender.join(10.0)
    assert "closing" in str(errors[0])


def test_a_reopened_shard_has_every_acknowledged_row_and_goes_on(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    shard.append([rows(0, 150), rows(0, 70, env=1), rows(0, 40, actor=2, incarnation=5)], 5.0)
    shard.close()
    shard = open_shard(tmp_path)
    stats = shard.stats()
    assert (stats.inserted, stats.rows, stats.streams, stats.epoch) == (260, 260, 3, 2)
    assert stats.incarnations == {0: 0, 2: 5}
    ack = shard.append([rows(140, 30), rows(70, 5, env=1)], 5.0)
    assert (ack.committed, ack.duplicates) == (25, 10)
    with pytest.raises(RejectedError) as refused:
        shard.append([rows(0, 5, actor=2, env=3, incarnation=4)], 5.0)
    assert refused.value.reason == "zombie"
    reader = open_reader(tmp_path, [shard], length=100, context=0)
    for _ in range(10):
        sequence = reader.sample(5.0)
        assert (np.diff(synthetic.row_number(sequence.columns)) == 1).all()
    reader.close()
    shard.close()


def test_lifetime_counters_and_cursors_survive_eviction_and_restart(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 256)
    shard.append([rows(0, 60, env=7)], 5.0)  # evicted below, then only the ledger knows it
    shard.append([rows(0, 400)], 5.0)
    before = shard.stats()
    shard.close()
    shard = open_shard(tmp_path, 0, 256)
    after = shard.stats()
    assert before.inserted == after.inserted == 460
    assert before.rows == after.rows <= 256
    assert after.evicted == 460 - after.rows
    assert shard.append([rows(50, 20, env=7)], 5.0).committed == 10
    view = TableView(tmp_path, TABLE, 1)
    assert (view.index.stream(0, 7).lo, view.index.stream(0, 7).hi) == (60, 70)
    shard.close()


def test_a_smaller_capacity_evicts_at_the_next_append(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 1024)
    shard.append([rows(0, 500)], 5.0)
    shard.close()
    shard = open_shard(tmp_path, 0, 256)
    shard.append([rows(500, 10)], 5.0)
    assert shard.stats().rows <= 256
    assert shard.stats().inserted == 510
    shard.close()


def test_an_interrupted_eviction_is_finished_at_opening(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 256)
    shard.append([rows(0, 250)], 5.0)
    shard.close()
    directory = layout.shard_dir(tmp_path, 0)
    ledger = layout.read_json(directory / "ledger.json")
    assert ledger is not None
    write_ledger(directory, ledger | {"evicted_rows": 64, "evicted_through": 0})
    shard = open_shard(tmp_path, 0, 256)
    assert (shard.stats().inserted, shard.stats().rows) == (250, 186)
    shard.close()


def test_evicted_segments_leave_the_disk(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 256)
    for start in range(0, 700, 50):
        shard.append([rows(start, 50)], 5.0)
    shard.close()
    directory = layout.shard_dir(tmp_path, 0)
    assert len(layout.segment_paths(directory)) <= 4
    assert list((directory / layout.SCRATCH).iterdir()) == []
    assert len(list(directory.glob("*.overlay.zarr"))) == len(layout.segment_paths(directory))


def test_a_reader_keeps_its_rows_while_they_are_evicted_under_it(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 256)
    shard.append([rows(0, 200)], 5.0)
    view = TableView(tmp_path, TABLE, 8)
    runs = view.index.stream(0, 0)
    pieces = list(runs.pieces(20, 100))
    shard.append([rows(200, 500)], 5.0)
    at = 20
    for piece in pieces:
        wanted = rows(at, piece.rows).columns["vector"]
        got = piece.home.segment.columns["vector"].reshape(-1, 4)[piece.first : piece.first + piece.rows]
        np.testing.assert_array_equal(got, wanted)
        at += piece.rows
    view.refresh()
    assert (runs.hi, view.index.rows) == (700, shard.stats().rows)
    shard.close()


def test_more_streams_than_slots_and_late_joiners_find_room(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 8192)
    for actor in range(40):
        shard.append([rows(0, 30 + actor, actor=actor)], 5.0)
    view = TableView(tmp_path, TABLE, 1)
    assert len(view.index.streams) == 40
    assert view.index.rows == shard.stats().rows == sum(30 + a for a in range(40))
    shard.close()


def test_sampling_is_uniform_over_shards_streams_and_positions(tmp_path: Path) -> None:
    shards = [open_shard(tmp_path, k, 4096) for k in range(3)]
    sizes = {(0, 0): 300, (0, 1): 90, (1, 0): 9, (1, 2): 40, (2, 5): 150}
    for (k, env), count in sizes.items():
        shards[k].append([rows(0, count, actor=k, env=env)], 5.0)
    reader = open_reader(tmp_path, shards, batch=64)
    seen: dict[tuple[int, int, int], int] = {}
    for _ in range(400):
        ids = reader.sample(5.0).ids
        for key in zip(ids.shard.tolist(), ids.stream.tolist(), ids.start.tolist(), strict=True):
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == sum(max(0, n - 8) for n in sizes.values())
    assert stats.chisquare(list(seen.values())).pvalue > 0.001
    reader.close()
    for shard in shards:
        shard.close()


def test_a_reader_may_start_before_the_shards_and_meet_them_later(tmp_path: Path) -> None:
    reader = open_reader(tmp_path, [])
    with pytest.raises(DeadlineError, match="prefill"):
        reader.sample(0.0)
    shards = []
    for k in range(3):
        shards.append(open_shard(tmp_path, k))
        shards[-1].append([rows(0, 20, actor=k)], 5.0)
        assert reader.counts() == (20 * (k + 1),) * 2
    reader.sample(1.0)
    reader.close()
    for shard in shards:
        shard.close()


def test_a_batch_that_no_shard_can_hold_is_refused_even_when_the_shard_comes_later(tmp_path: Path) -> None:
    reader = open_reader(tmp_path, [], length=300)
    shard = open_shard(tmp_path, 0, 256)
    with pytest.raises(ConfigError, match="capacity_rows - segment_rows"):
        reader.sample(0.0)
    shard.close()


def test_min_rows_beyond_the_capacity_is_refused(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, 0, 256)
    with pytest.raises(ConfigError, match="min_rows"):
        open_reader(tmp_path, [shard], limiter=RateLimiter(1.0, 300, 50, 300))
    shard.close()


def test_credit_flows_to_the_shard_that_has_actors(tmp_path: Path) -> None:
    shards = [open_shard(tmp_path, k, initial_grant=0) for k in range(2)]
    reader = open_reader(tmp_path, shards, limiter=RateLimiter(1.0, 100, 50, 20))
    sent = threading.Thread(target=shards[1].append, args=([rows(0, 150)], 20.0))
    sent.start()
    while sent.is_alive():
        reader.pump()
    assert shards[1].stats().inserted == 150
    reader.close()
    for shard in shards:
        shard.close()


def test_metrics_tell_what_happened(tmp_path: Path) -> None:
    metrics = Metrics("run", "replay", 0)
    shard = ReplayShard(tmp_path, 0, TABLE, capacity_rows=256, metrics=metrics)
    for start in range(0, 400, 50):
        shard.append([rows(start, 50)], 5.0)
    shard.append([rows(0, 50)], 5.0)
    with pytest.raises(RejectedError):
        shard.append([rows(500, 50)], 5.0)
    assert metrics.value("replay_rows_inserted_total") == 400
    assert metrics.value("replay_rows_duplicate_total") == 50
    assert metrics.value("replay_rows_rejected_total", reason="gap") == 50
    assert metrics.value("replay_rows") == shard.stats().rows
    assert metrics.value("replay_rows_evicted_total") == 400 - shard.stats().rows
    assert metrics.value("replay_bytes") == shard.stats().nbytes > 0
    assert shard.stats().rejected == 50
    shard.close()


def test_flush_covers_full_and_growing_segments(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    shard.append([rows(0, 500), rows(0, 10, env=1)], 5.0)
    assert not (shard.directory / "flushed.json").exists()
    shard.flush()
    flushed = json.loads((shard.directory / "flushed.json").read_text())
    assert sum(sum(slots) for slots in flushed["committed"].values()) == 510
    shard.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 2), st.integers(1, 120)),
            st.tuples(st.just("repeat"), st.integers(0, 2), st.integers(1, 120)),
            st.tuples(st.just("reincarnate"), st.integers(0, 2), st.integers(1, 120)),
            st.tuples(st.just("reopen"), st.just(0), st.just(0)),
            st.tuples(st.just("look"), st.just(0), st.just(0)),
        ),
        min_size=3,
        max_size=9,
    )
)
def test_a_shard_behaves_like_a_list_that_forgets_its_oldest_rows(
    tmp_path: Path, steps: list[tuple[str, int, int]]
) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    shard, view = open_shard(root, 0, 320), TableView(root, TABLE, 5)
    model: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}  # (incarnation, row number) by env
    for what, env, count in steps:
        incarnation = max((i for stream in model.values() for i, _ in stream), default=0)
        mine = [n for i, n in model[env] if i == incarnation]
        if what == "append":
            shard.append([rows(len(mine), count, env=env, incarnation=incarnation)], 5.0)
            model[env] += [(incarnation, n) for n in range(len(mine), len(mine) + count)]
        elif what == "repeat" and mine:
            ack = shard.append([rows(0, len(mine), env=env, incarnation=incarnation)], 5.0)
            assert (ack.committed, ack.duplicates) == (0, len(mine))
        elif what == "reincarnate":
            shard.append([rows(0, count, env=env, incarnation=incarnation + 1)], 5.0)
            model[env] += [(incarnation + 1, n) for n in range(count)]
        elif what == "reopen":
            shard.close()
            shard = open_shard(root, 0, 320)
        view.refresh()
        total = sum(map(len, model.values()))
        assert shard.stats().inserted == total
        assert view.index.rows == shard.stats().rows <= 320
        assert view.index.rows >= min(total, 320 - 64 - 120)
        for env_, wanted in model.items():
            runs = view.index.stream(0, env_)
            assert not runs.starts or runs.hi == len(wanted)
            at = runs.lo
            for piece in runs.pieces(runs.lo, runs.hi - runs.lo):
                columns = {n: a.reshape(-1, *a.shape[2:]) for n, a in piece.home.segment.columns.items()}
                for i in range(piece.first, piece.first + piece.rows):
                    inc, number = wanted[at]
                    assert (columns["incarnation"][i], synthetic.row_number(columns)[i]) == (inc, number)
                    at += 1
    shard.close()


def test_a_ledger_loaded_before_its_rows_were_vetted_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limiter() -> RateLimiter:
        return RateLimiter(1.0, 100, 400, 10)

    shard = open_shard(tmp_path)
    shard.append([rows(0, 300)], 5.0)
    reader = open_reader(tmp_path, [shard], limiter=limiter())
    reader.sample(5.0)
    state, owed = reader.state(), reader.limiter.error
    reader.close()
    shard.close()
    release = threading.Event()
    good_rows = MappedSegment.good_rows

    def later(home: MappedSegment) -> np.ndarray:
        release.wait(10.0)
        return good_rows(home)

    monkeypatch.setattr(follow, "AT_ONCE_NBYTES", 0)
    monkeypatch.setattr(MappedSegment, "good_rows", later)
    reader = open_reader(tmp_path, [], limiter=limiter())
    assert reader.counts() == (300, 0)
    reader.load(state)
    release.set()
    assert reader.settle(10.0)
    assert reader.counts() == (300, 300)
    assert (reader.limiter.error, reader.limiter.prefilled) == (owed, True)
    reader.sample(5.0)
    reader.close()
