from hypothesis import given
from hypothesis import strategies as st

from replay.credits import DEAD_SECONDS, DOUBT_SECONDS, REPEAT_SECONDS, GrantSplitter, split_free
from system.errors import DeadlineError


@given(free=st.integers(-5, 10_000), waiting=st.dictionaries(st.integers(0, 9), st.integers(0, 50)))
def test_shares_add_up_to_what_is_free(free: int, waiting: dict[int, int]) -> None:
    shares = split_free(free, waiting)
    assert shares.keys() == waiting.keys()
    assert sum(shares.values()) == (max(0, free) if waiting else 0)


def test_free_credit_goes_to_the_shards_that_wait() -> None:
    assert split_free(20, {0: 0, 1: 7, 2: 0}) == {0: 0, 1: 20, 2: 0}
    assert split_free(20, {0: 0, 2: 0}) == {0: 10, 2: 10}
    assert split_free(7, {0: 1, 1: 7, 2: 3}) == {0: 3, 1: 2, 2: 2}


class NearShard:
    """Takes a grant at once, or not at all."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.dead = False

    def grant(self, max_inserted: int) -> None:
        if self.dead:
            raise DeadlineError("no answer")
        self.got.append(max_inserted)


class FarShard:
    """Hears of grants when `deliver` is called; knows what it told whom, as `GrpcShardControl`."""

    def __init__(self) -> None:
        self.believes = self.ceiling = 0
        self.settled = True
        self.on_the_way: list[int] = []

    def grant(self, max_inserted: int) -> None:
        self.on_the_way.append(max_inserted)
        self.ceiling = max(self.ceiling, max_inserted)
        self.settled = False

    def deliver(self) -> None:
        if self.on_the_way:
            self.believes = self.ceiling = self.on_the_way[-1]
            self.on_the_way.clear()
            self.settled = True


def test_credit_is_given_to_others_only_when_its_holder_has_heard_of_it() -> None:
    one, other = FarShard(), FarShard()
    splitter = GrantSplitter([one, other])
    splitter.send(100, {0: 0, 1: 0}, {}, now=0.0)
    one.deliver()
    other.deliver()
    assert (one.believes, other.believes) == (50, 50)
    for now in (0.01, 0.02):
        splitter.send(100, {0: 0, 1: 0}, {1: 80}, now)
        assert (one.on_the_way, other.on_the_way) == ([0], [])
    one.deliver()
    splitter.send(100, {0: 0, 1: 0}, {1: 80}, now=0.03)
    other.deliver()
    assert (one.believes, other.believes) == (0, 100)


def test_a_dead_shard_is_left_alone_and_its_credit_goes_elsewhere_after_the_doubt() -> None:
    shards = [NearShard(), NearShard()]
    splitter = GrantSplitter(shards)
    splitter.send(100, {0: 0, 1: 0}, {}, now=0.0)
    assert (shards[0].got, shards[1].got) == ([50], [50])
    shards[1].dead = True
    splitter.send(110, {0: 0, 1: 0}, {}, now=0.5)
    assert not splitter.answers(1)
    splitter.send(110, {0: 0, 1: 0}, {}, now=0.6)
    assert shards[0].got[-1] == 60  # the other 50 may still be used
    splitter.send(110, {0: 0, 1: 0}, {1: 10}, now=0.5 + DOUBT_SECONDS)
    assert shards[0].got[-1] == 110
    assert splitter.failures == 2
    shards[1].dead = False
    splitter.send(110, {0: 0, 1: 0}, {}, now=4.0 + DOUBT_SECONDS)
    assert shards[1].got[-1] == 0  # told what it has not, before it gets anything
    splitter.send(110, {0: 0, 1: 0}, {}, now=5.0 + DOUBT_SECONDS)
    assert splitter.answers(1)
    assert (shards[0].got[-1], shards[1].got[-1]) == (55, 55)


def test_a_shard_that_hears_nothing_gets_nothing_more_though_its_appends_wait() -> None:
    silent, live = FarShard(), FarShard()
    splitter = GrantSplitter([silent, live])
    now = 0.0
    while now < 1.0 + DOUBT_SECONDS:
        splitter.send(90, {0: 0, 1: 0}, {0: 500, 1: 30}, now)
        live.deliver()
        now += 0.1
    assert not splitter.answers(0)
    assert live.believes == 90
    silent.deliver()
    splitter.send(90, {0: 0, 1: 0}, {0: 500, 1: 30}, now)
    assert splitter.answers(0)


def test_grants_are_repeated_after_forgetting_and_now_and_then() -> None:
    shard = NearShard()
    splitter = GrantSplitter([shard])
    for _ in range(3):
        splitter.send(10, {0: 0}, {}, now=0.0)
    splitter.forget()
    splitter.send(10, {0: 0}, {}, now=0.0)
    assert shard.got == [10, 10]
    splitter.send(10, {0: 0}, {}, now=REPEAT_SECONDS)
    assert shard.got == [10, 10, 10]


def test_a_shard_that_leaves_gives_its_credit_back_first() -> None:
    stays, leaves = FarShard(), FarShard()
    splitter = GrantSplitter([stays, leaves])
    splitter.send(100, {0: 0, 1: 0}, {}, now=0.0)
    stays.deliver()
    leaves.deliver()
    splitter.leave(1)
    assert splitter.shards == [0]
    splitter.send(95, {0: 0, 1: 5}, {}, now=0.1)
    assert leaves.on_the_way == [5]
    assert stays.on_the_way == []
    leaves.deliver()
    splitter.send(95, {0: 0, 1: 5}, {}, now=0.2)
    stays.deliver()
    assert (stays.believes, leaves.believes) == (95, 5)


def test_a_shard_that_joins_gets_its_share() -> None:
    first, second = NearShard(), NearShard()
    splitter = GrantSplitter([first])
    splitter.send(100, {0: 0}, {}, now=0.0)
    splitter.join(7, second)
    splitter.send(100, {0: 0, 7: 1000}, {}, now=DEAD_SECONDS)
    assert (first.got[-1], second.got[-1]) == (50, 1050)
