"""What every ReplayWriter + ReplayReader must do; run on the in-memory twin and on shard + local reader."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from replay import synthetic
from replay.limiter import RateLimiter
from system.errors import ConfigError, DeadlineError, RejectedError, SchemaError
from system.experience import Ack, Chunk, WriteBack
from tests.conformance.replay.replays import EPISODE, Open, assert_true_rows, rows


def test_appended_rows_are_acknowledged_and_counted(pair: Open) -> None:
    with pair() as p:
        ack = p.writer.append([rows(0, 30), rows(0, 20, env=1)], 10.0)
        assert (ack.committed, ack.duplicates) == (50, 0)
        assert p.reader.counts() == (50, 50)


def test_repeated_rows_are_dropped(pair: Open) -> None:
    with pair() as p:
        p.writer.append([rows(0, 30)], 10.0)
        ack = p.writer.append([rows(10, 40)], 10.0)
        assert (ack.committed, ack.duplicates) == (20, 20)
        assert p.writer.append([rows(0, 50)], 10.0).committed == 0
        assert p.reader.counts() == (50, 50)


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (rows(31, 5), "gap"),
        (rows(EPISODE, 5), "gap"),
        (rows(5, 5, incarnation=2), "incarnation"),
    ],
)
def test_rows_out_of_order_are_refused(pair: Open, chunk: Chunk, reason: str) -> None:
    with pair() as p:
        p.writer.append([rows(0, 30)], 10.0)
        with pytest.raises(RejectedError) as refused:
            p.writer.append([chunk], 10.0)
        assert refused.value.reason == reason
        assert p.reader.counts() == (30, 30)


def test_an_old_incarnation_is_refused_on_all_streams_of_its_actor(pair: Open) -> None:
    with pair() as p:
        p.writer.append([rows(0, 10), rows(0, 10, incarnation=3)], 10.0)
        for env in (0, 1):
            with pytest.raises(RejectedError) as refused:
                p.writer.append([rows(0, 10, env=env, incarnation=2)], 10.0)
            assert refused.value.reason == "zombie"
        assert p.writer.append([rows(0, 10, actor=1)], 10.0).committed == 10


def test_a_new_incarnation_closes_the_open_episode_in_what_is_sampled(pair: Open) -> None:
    with pair(length=30, context=0) as p:
        p.writer.append([rows(0, 20), rows(0, 20, incarnation=1)], 10.0)
        sequence = p.reader.sample(10.0)
        for b in range(4):
            border = int(np.flatnonzero(sequence.columns["incarnation"][b] == 1)[0])
            assert sequence.columns["is_first"][b, border]
            assert sequence.columns["is_last"][b, border - 1]
            assert not sequence.columns["is_terminal"][b, border - 1]


def test_a_stream_that_continues_after_rows_elsewhere_is_taken_up_behind_a_gap(pair: Open) -> None:
    def later(start: int, count: int) -> Chunk:
        return replace(rows(start, count), continues=True)

    with pair(batch=64) as opened:
        assert opened.writer.append([later(10, 40)], 5.0).committed == 40  # its beginning is elsewhere
        assert opened.writer.append([rows(50, 10)], 5.0).committed == 10
        with pytest.raises(RejectedError) as refused:
            opened.writer.append([rows(80, 20)], 5.0)
        assert refused.value.reason == "gap"
        assert opened.writer.append([later(80, 20)], 5.0).committed == 20
        assert opened.writer.append([later(80, 30)], 5.0) == Ack(committed=10, duplicates=20)
        assert opened.writer.append([rows(110, 40)], 5.0).committed == 40
        assert opened.writer.append([later(20, 5)], 5.0).duplicates == 5  # never backwards
        starts: set[int] = set()
        for _ in range(20):
            sequence = opened.reader.sample(5.0)
            number = synthetic.row_number(dict(sequence.columns), EPISODE)
            assert (np.diff(number, axis=1) == 1).all()
            starts |= set(number[:, 0].tolist())
        assert starts == {*range(10, 52), *range(80, 142)}
        assert opened.reader.counts() == (120, 120)


def test_sampled_rows_are_the_rows_that_were_written(pair: Open) -> None:
    with pair() as p:
        for start in range(0, 600, 40):
            p.writer.append([rows(start, 40), rows(start, 40, env=1)], 10.0)
        for _ in range(20):
            sequence = p.reader.sample(10.0)
            assert sequence.shape == (4, 9)
            assert sequence.context == 1
            assert_true_rows(sequence)


def test_a_batch_survives_until_the_ring_comes_round(pair: Open) -> None:
    with pair(ring=2) as p:
        p.writer.append([rows(0, 500)], 10.0)
        first = p.reader.sample(10.0)
        kept = {name: values.copy() for name, values in first.columns.items()}
        second = p.reader.sample(10.0)
        for name, values in kept.items():
            np.testing.assert_array_equal(first.columns[name], values)
            assert not np.shares_memory(first.columns[name], second.columns[name])


def test_capacity_bounds_the_live_rows_and_keeps_the_newest(pair: Open) -> None:
    with pair(capacity_rows=512) as p:
        for start in range(0, 1500, 100):
            p.writer.append([rows(start, 100)], 10.0)
        inserted, live = p.reader.counts()
        assert inserted == 1500
        assert 512 - 64 <= live <= 512
        for _ in range(20):
            sequence = p.reader.sample(10.0)
            assert_true_rows(sequence)
            assert synthetic.row_number(sequence.columns, EPISODE).min() >= 1500 - live


def test_written_back_columns_are_sampled_afterwards(pair: Open) -> None:
    with pair(batch=2) as p:
        p.writer.append([rows(0, 300)], 10.0)
        sequence = p.reader.sample(10.0)
        latent = np.arange(2 * 5 * 2, dtype=np.uint16).reshape(2, 5, 2) + 7
        back = WriteBack(ids=sequence.ids, offset=3, columns={"latent": latent})
        assert p.reader.write_back(back) == 10
        wanted = {}
        for b in range(2):
            for i in range(5):
                wanted[int(sequence.ids.start[b]) + 3 + i] = latent[b, i]
        seen = 0
        for _ in range(60):
            later = p.reader.sample(10.0)
            for b in range(2):
                for t in range(9):
                    value = wanted.get(int(later.ids.start[b]) + t)
                    if value is not None:
                        np.testing.assert_array_equal(later.columns["latent"][b, t], value)
                        seen += 1
        assert seen > 0


def test_write_back_to_evicted_rows_is_dropped_and_counted(pair: Open) -> None:
    with pair(capacity_rows=512) as p:
        p.writer.append([rows(0, 300)], 10.0)
        sequence = p.reader.sample(10.0)
        for start in range(300, 1500, 100):
            p.writer.append([rows(start, 100)], 10.0)
        latent = np.zeros((4, 9, 2), np.uint16)
        assert p.reader.write_back(WriteBack(ids=sequence.ids, offset=0, columns={"latent": latent})) == 0
        assert p.reader.dropped_write_backs == 36


@pytest.mark.parametrize(
    "columns",
    [
        {"vector": np.zeros((4, 2, 4), np.float32)},
        {"latent": np.zeros((4, 2, 2), np.int32)},
        {"latent": np.zeros((4, 2, 3), np.uint16)},
    ],
)
def test_write_back_of_anything_but_the_overlay_is_refused(pair: Open, columns: dict[str, Any]) -> None:
    with pair() as p:
        p.writer.append([rows(0, 100)], 10.0)
        ids = p.reader.sample(10.0).ids
        with pytest.raises(SchemaError):
            p.reader.write_back(WriteBack(ids=ids, offset=0, columns=columns))


def test_sampling_waits_for_rows_and_says_so(pair: Open) -> None:
    with pair(limiter=RateLimiter(4.0, 100, 50, 20)) as p:
        p.writer.append([rows(0, 60)], 10.0)
        with pytest.raises(DeadlineError, match="waits for the prefill"):
            p.reader.sample(0.05)


def test_appending_waits_for_training_and_says_so(pair: Open) -> None:
    with pair(limiter=RateLimiter(1.0, 100, 40, 20)) as p:
        with pytest.raises(DeadlineError):
            p.writer.append([rows(0, 300)], 0.3)
        assert p.reader.counts()[0] == 140
        p.reader.sample(10.0)
        p.reader.sample(10.0)
        with pytest.raises(DeadlineError, match="waits for new rows"):
            p.reader.sample(0.05)
        assert p.reader.limiter.trained <= p.reader.limiter.inserted - 100 + 40


def test_a_held_back_append_may_be_sent_again(pair: Open) -> None:
    with pair(limiter=RateLimiter(1.0, 100, 40, 20)) as p:
        with pytest.raises(DeadlineError):
            p.writer.append([rows(0, 200)], 0.3)
        for _ in range(2):
            p.reader.sample(10.0)
        with ThreadPoolExecutor(1) as other:
            ack = other.submit(p.writer.append, [rows(0, 200)], 10.0)
            while not ack.done():
                p.reader.pump()
        assert ack.result().committed + ack.result().duplicates == 200
        assert p.reader.counts() == (200, 200)


def test_a_saved_reader_goes_on_with_the_same_batches(pair: Open) -> None:
    with pair() as p:
        p.writer.append([rows(0, 400), rows(0, 300, env=2)], 10.0)
        p.reader.sample(10.0)
        state = json.loads(json.dumps(p.reader.state()))
        wanted = [p.reader.sample(10.0).columns["vector"].copy() for _ in range(3)]
        p.reader.load(state)
        for batch in wanted:
            np.testing.assert_array_equal(p.reader.sample(10.0).columns["vector"], batch)
        assert p.reader.limiter.trained == 4 * 32


def test_a_limiter_that_would_deadlock_is_refused(pair: Open) -> None:
    with (
        pytest.raises(ConfigError, match="2 \\* tolerance_rows - 1"),
        pair(limiter=RateLimiter(1.0, 0, 16, 1)),
    ):
        pass


def test_sequences_longer_than_the_capacity_are_refused(pair: Open) -> None:
    with pytest.raises(ConfigError, match="capacity_rows"), pair(length=600, capacity_rows=512):
        pass
