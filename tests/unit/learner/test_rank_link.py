"""Links between ranks: messages whole, strangers out, silence and closed connections noticed."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from learner import rank_join
from learner.rank_join import _greet, accept_ranks, join_rank_zero, listen
from learner.rank_link import RankLink
from system.errors import InfrastructureError, RankLostError

SECRET, WAIT = "between us", 20.0


class Ends:
    """Both ends of one link, in one process."""

    def __init__(self, silence: float, secret: str = SECRET) -> None:
        self.lost: list[tuple[int, str]] = []
        self.heard = threading.Event()

        def note(rank: int, why: str) -> None:
            self.lost.append((rank, why))
            if rank == 1:  # said by rank 0; the other end sees the connection close meanwhile
                self.heard.set()

        def make(connection: socket.socket, rank: int) -> RankLink:
            return RankLink(connection, rank, silence=silence, entered=lambda: 17, on_lost=note)

        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        found: list[RankLink] = []

        def join() -> None:
            with contextlib.suppress(RankLostError):
                found.append(join_rank_zero("127.0.0.1", port, 1, secret, seconds=WAIT, make=make))

        caller = threading.Thread(target=join)
        caller.start()
        try:
            self.zero = accept_ranks(listener, 2, SECRET, seconds=2.0, make=make)[1]
        finally:
            caller.join(WAIT)
            listener.close()
        self.one = found[0]

    def close(self) -> None:
        for link in (self.zero, self.one):
            link.expect_end()
        self.zero.close()
        self.one.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends(silence=5.0)
    yield made
    made.close()


def test_messages_arrive_whole_and_in_order(ends: Ends):
    rng = np.random.default_rng(0)
    arrays = {
        "large": rng.normal(size=(3, 200_000)),
        "empty": np.zeros((0, 4), np.float32),
        "flag": np.array([True, False]),
        "one": np.array(7, np.int16),
        "strided": np.arange(12).reshape(3, 4)[:, ::2],
    }
    ends.zero.send("first", {"a": [1, None, "x"]}, arrays)
    ends.zero.send("second")
    message = ends.one.receive(WAIT)
    assert message is not None
    assert (message.op, message.tree) == ("first", {"a": [1, None, "x"]})
    assert message.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        assert np.array_equal(message.arrays[name], array)
    second = ends.one.receive(WAIT)
    assert second is not None
    assert second.op == "second"
    assert ends.one.receive(0.0) is None


def test_buffers_of_a_batch_stay_valid_while_the_next_one_arrives(ends: Ends):
    for value in range(2):
        ends.zero.send("learn", None, {"x": np.full(5, value)}, reused=True)
    first, second = ends.one.receive(WAIT), ends.one.receive(WAIT)
    assert first is not None
    assert second is not None
    assert np.array_equal(first.arrays["x"], np.zeros(5))
    assert np.array_equal(second.arrays["x"], np.ones(5))


def test_both_ends_learn_how_many_collectives_the_other_has_entered(ends: Ends):
    for _ in range(40):
        assert ends.one.receive(0.5) is None  # beats are no messages
        if ends.zero.entered and ends.one.entered:
            break
    assert (ends.zero.entered, ends.one.entered) == (17, 17)
    assert ends.lost == []


def test_closed_connection_is_a_lost_rank(ends: Ends):
    ends.one._socket.shutdown(socket.SHUT_RDWR)
    assert ends.heard.wait(WAIT)
    with pytest.raises(RankLostError, match="learner rank 1 is lost: its connection closed") as caught:
        ends.zero.receive(WAIT)
    assert caught.value.ranks == (1,)
    with pytest.raises(RankLostError):
        ends.zero.send("anything")


def test_failure_is_told_with_its_reason(ends: Ends):
    with contextlib.suppress(RankLostError):  # the other end hangs up at once
        ends.one.send("failed", "MemoryError: no memory")
    with pytest.raises(RankLostError, match="it failed: MemoryError: no memory"):
        ends.zero.receive(WAIT)


@pytest.mark.parametrize("word", ["end", "lost"])
def test_last_word_makes_a_closed_connection_no_loss(ends: Ends, word: str):
    ends.zero.send(word, {})
    ends.zero.expect_end()
    ends.zero.close()
    message = ends.one.receive(WAIT)
    assert message is not None
    assert message.op == word
    assert ends.one.over
    assert ends.lost == []


def test_silence_is_a_lost_rank():
    ends = Ends(silence=1.0)
    with ends.one._sending:  # as a process that is stopped: it sends no beats
        assert ends.heard.wait(WAIT)
    assert "it has said nothing for" in dict(ends.lost)[1]
    ends.close()


def test_stranger_without_the_secret_is_turned_away():
    with pytest.raises(RankLostError, match="rank 1 is lost: it did not join within 2 s"):
        Ends(silence=1.0, secret="guessed")


def test_stranger_that_talks_nonsense_does_not_hold_up_the_ranks():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]

        def shout() -> None:
            with socket.create_connection(("127.0.0.1", port), WAIT) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                connection.recv(1)

        caller = threading.Thread(target=shout)
        caller.start()
        with pytest.raises(RankLostError, match="did not join"):
            accept_ranks(listener, 2, SECRET, seconds=1.0, make=lambda c, r: pytest.fail("a link was made"))
        caller.join(WAIT)


@pytest.mark.parametrize("answer", ['{"rank": 1e999, "nonce": "", "proof": ""}', '["a"]', "[" * 4000])
def test_stranger_with_an_odd_answer_is_turned_away(answer: str):
    here, there = socket.socketpair()
    with here, there:
        there.sendall(answer.encode() + b"\n")
        assert _greet(here, SECRET) == -1


def test_stranger_that_dribbles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_join, "HANDSHAKE_SECONDS", 0.2)
    here, there = socket.socketpair()
    done = threading.Event()

    def dribble() -> None:
        while not done.wait(0.02):
            with contextlib.suppress(OSError):
                there.sendall(b"x")

    caller = threading.Thread(target=dribble)
    caller.start()
    try:
        with here, there:
            assert _greet(here, SECRET) == -1
            done.set()
            caller.join(WAIT)
    finally:
        done.set()
        caller.join(WAIT)


def test_rank_that_finds_nobody_says_where_it_looked():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RankLostError, match=f"rank 0 is lost: it does not answer at 127.0.0.1:{port}"):
        join_rank_zero("127.0.0.1", port, 1, SECRET, seconds=0.3, make=lambda c, r: pytest.fail("joined"))


def test_taken_port_heals_by_starting_again():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InfrastructureError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)
