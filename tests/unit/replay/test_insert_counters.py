"""The governor beside damaged insert counters: what no shard can have inserted is not owed."""

from dataclasses import dataclass

import pytest

from replay.governor import Governor
from replay.limiter import RateLimiter
from system.metrics import Metrics


@dataclass
class Shard:
    """Counters and a control that hears at once."""

    index: int
    inserted: int = 0
    waiting: int = 0
    believes: int = 0

    def grant(self, max_inserted: int) -> None:
        self.believes = max_inserted


def ledger_of(inserted: int) -> tuple[Governor, Shard, Metrics]:
    """A governor that has seen one shard with so many rows."""
    metrics, shard = Metrics("r", "learner"), Shard(0, inserted=inserted)
    governor = Governor(RateLimiter(4.0, 100, 4000, 10), [shard], metrics=metrics)
    look(governor, shard)
    return governor, shard, metrics


def look(governor: Governor, shard: Shard) -> int:
    governor.observe(0.0, [shard], 1000, 1000)
    governor.pump(0.0, at_once=True)
    return governor.limiter.inserted


@pytest.mark.parametrize("bit", [*range(23, 64)])
def test_a_flipped_bit_of_a_counter_is_not_owed(bit: int) -> None:
    governor, shard, metrics = ledger_of(1000)
    believes = shard.believes
    shard.inserted = 1000 - (1 << 63) if bit == 63 else 1000 ^ (1 << bit)
    for _ in range(3):
        assert look(governor, shard) == 1000
        assert shard.believes == believes > 1000
    assert metrics.value("replay_counters_refused_total", counter="inserted") == 1
    shard.inserted = 1007  # the owner has written it
    assert look(governor, shard) == 1007


def test_a_count_that_the_owner_stands_by_is_followed_but_its_leap_not_owed() -> None:
    governor, shard, _ = ledger_of(1000)
    shard.inserted = 1 << 40
    assert look(governor, shard) == 1000
    shard.inserted += 7
    assert look(governor, shard) == 1007
    assert shard.believes > 1 << 40
    shard.inserted += 5
    assert look(governor, shard) == 1012


def test_a_fall_by_a_flipped_bit_is_not_owed_again() -> None:
    governor, shard, _ = ledger_of((1 << 30) + 1000)
    shard.inserted -= 1 << 30
    assert look(governor, shard) == (1 << 30) + 1000
    shard.inserted += (1 << 30) + 7
    assert look(governor, shard) == (1 << 30) + 1007


def test_rows_that_were_granted_are_believed_however_many() -> None:
    governor, shard, _ = ledger_of(1000)
    governor.grants.send(1 << 30, {0: 1000}, {0: 0}, 10.0)
    shard.inserted = 1 << 30
    assert look(governor, shard) == 1 << 30
