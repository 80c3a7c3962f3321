"""Taking batches, write-backs and states apart for ranks, and putting them together again."""

from typing import Any

import numpy as np
import pytest

from learner.carrier_state import state_of, write_back_of
from learner.rank_parts import PENDING, join_write_backs, split_sequence, state_part
from system.experience import Sequence, SequenceIds, WriteBack


def ids_of(batch: int, *, source: bool) -> SequenceIds:
    return SequenceIds(
        shard=np.arange(batch, dtype=np.int32),
        stream=np.arange(batch, dtype=np.int32) + 10,
        start=np.arange(batch, dtype=np.int64) * 7,
        source=np.arange(batch, dtype=np.int8) if source else None,
    )


def rows_of(batch: int, *, rich: bool) -> WriteBack:
    return WriteBack(
        ids=ids_of(batch, source=rich),
        offset=1,
        columns={"deter": np.arange(batch * 6, dtype=np.uint16).reshape(batch, 2, 3)},
        priority=np.arange(batch * 2, dtype=np.float32).reshape(batch, 2) if rich else None,
    )


def same(left: Any, right: Any) -> bool:
    """Whether two carriers hold the same."""
    a, b = state_of(left), state_of(right)

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        return np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y

    return equal(a, b)


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_rank_gets_its_sequences_with_all_that_belongs_to_them(ranks: int, rich: bool):
    batch = 6
    whole = Sequence(
        columns={"reward": np.arange(batch * 4, dtype=np.float32).reshape(batch, 4)},
        ids=ids_of(batch, source=rich),
        context=1,
        weights=np.arange(batch, dtype=np.float32) if rich else None,
        goal={"x": np.arange(batch)} if rich else None,
    )
    parts = split_sequence(whole, ranks)
    assert [part.shape for part in parts] == [(batch // ranks, 4)] * ranks
    assert all(part.context == 1 for part in parts)
    for name in ("shard", "stream", "start", "source"):
        found = [getattr(part.ids, name) for part in parts]
        expected = getattr(whole.ids, name)
        assert (expected is None and found == [None] * ranks) or np.array_equal(
            np.concatenate(found), expected
        )
    assert np.array_equal(np.concatenate([part.columns["reward"] for part in parts]), whole.columns["reward"])
    assert [part.weights is None for part in parts] == [not rich] * ranks
    if rich:
        assert np.array_equal(np.concatenate([part.weights for part in parts]), whole.weights)
        assert np.array_equal(np.concatenate([part.goal["x"] for part in parts]), whole.goal["x"])


@pytest.mark.parametrize("rich", [True, False])
def test_rows_of_a_late_agent_are_dealt_out_and_joined_again(rich: bool):
    whole = rows_of(6, rich=rich)
    state = {"updates": 3, PENDING: {"metrics": {"loss": 1.0}, "rows": state_of(whole)}}
    parts = [state_part(state, rank, 3) for rank in range(3)]
    assert all(part["updates"] == 3 and part[PENDING]["metrics"] == {"loss": 1.0} for part in parts)
    joined = join_write_backs([write_back_of(part[PENDING]["rows"]) for part in parts])
    assert joined is not None
    assert same(joined, whole)


def test_state_without_waiting_rows_is_the_same_for_all():
    for state in ({"updates": 3}, {"updates": 3, PENDING: {"metrics": {}, "rows": None}}):
        assert state_part(state, 1, 2) == state


def test_skipped_update_writes_nothing_back():
    assert join_write_backs([None, None]) is None


def test_ranks_that_disagree_about_a_skipped_update_are_a_bug():
    with pytest.raises(AssertionError, match="skipped"):
        join_write_backs([rows_of(2, rich=True), None])
