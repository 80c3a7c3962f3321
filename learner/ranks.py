"""Many learner ranks as one agent: the global batch is dealt out, gradients and statistics are those of all.

Rank 0 runs the learn loop. It deals each batch to the ranks, all of them compute their part (the noise is
drawn for the whole batch everywhere, so nobody sends any), gradients are averaged in the agent, and what is
written back returns to rank 0. State lives in rank 0's checkpoint alone and is dealt out before the first
update, so another number of ranks may resume. Between `learner.loop` and `learner.distributed`; messages go
through `learner.rank_link`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from learner import distributed
from learner.carrier_state import sequence_of, state_of, write_back_of
from learner.distributed import CollectiveError, join_group, watch
from learner.rank_join import RankPlace, accept_ranks, join_rank_zero, listen
from learner.rank_link import Message, RankLink, rank_lost
from learner.rank_parts import PENDING, join_write_backs, split_sequence, state_part
from learner.state_tree import join_state, split_state
from system.errors import InfrastructureError, RankLostError
from system.experience import Sequence, WriteBack
from system.interfaces import Agent
from system.metrics import Metrics

log = logging.getLogger(__name__)

BLAME_SECONDS = 1.5
"""A rank whose process ended is heard of at once, one that stopped when it has been silent long enough."""
WARM_UPDATES = 3
SLOW_FACTOR = 5.0
"""A rank is stuck when an update takes this many times the slowest of the last ones."""


def weights_digest(agent: Agent) -> int:
    """One number for the acting weights, the same on all ranks that are alike."""
    digest = 0
    for name, array in sorted(agent.weights().items()):
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = zlib.crc32(raw, zlib.crc32(name.encode(), digest))
    return digest


class Pace:
    """How long an update may take before a rank counts as stuck: generous at first, then by the last ones."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._seconds: deque[float] = deque(maxlen=10)
        self._updates = 0

    def add(self, seconds: float) -> None:
        self._updates += 1
        if self._updates > WARM_UPDATES:
            self._seconds.append(seconds)
            distributed.set_patience(max(self._least, SLOW_FACTOR * max(self._seconds)))


class RankHub:
    """Rank 0's side of the group: one link to each other rank, and the process group."""

    def __init__(self, place: RankPlace, device: torch.device) -> None:
        """Wait for all ranks and form the group. Raises: RankLostError, InfrastructureError."""
        assert place.rank == 0, place
        assert place.ranks > 1, place
        self.place, self.device = place, device
        self.links: list[RankLink] = []
        watch.lost = lambda: bool(self.lost)
        with listen(place.host, place.port) as listener:
            links = accept_ranks(
                listener, place.ranks, place.secret, seconds=place.join_seconds, make=self._link
            )
        self.links += [links[rank] for rank in sorted(links)]
        store = listen(place.host, 0)
        for link in self.links:
            link.send("group", store.getsockname()[1])
        join_group(0, place.ranks, device, place.host, store, place.join_seconds)
        log.info("ranks joined", extra={"ranks": place.ranks, "device": str(device)})

    def _link(self, connection: socket.socket, rank: int) -> RankLink:
        return RankLink(connection, rank, silence=self.place.silence, entered=_entered, on_lost=_note_lost)

    @property
    def lost(self) -> dict[int, str]:
        """Why, by rank; empty while all are there."""
        return {link.rank: link.lost for link in self.links if link.lost}

    def check(self) -> None:
        """Raises: RankLostError when a rank is gone, though nothing is asked of it now."""
        if self.lost:
            raise self.blame(InfrastructureError("between two updates"))

    def answer(self, link: RankLink, op: str) -> Message:
        """Raises: CollectiveError, RankLostError."""
        message = link.receive(watch.patience)
        if message is None:
            link.lose(f"it did not answer within {watch.patience:.0f} s")
            raise link.error()
        if message.op == "broken":
            raise CollectiveError(str(message.tree))
        assert message.op == op, (message.op, op)
        return message

    def blame(self, error: Exception) -> RankLostError:
        """Find out who is gone, or else who is behind; tell the others."""
        deadline = time.monotonic() + BLAME_SECONDS
        while not self.lost and time.monotonic() < deadline:
            time.sleep(0.02)
        lost = self.lost or {
            link.rank: f"it is stuck: it has entered {link.entered} collectives, rank 0 {watch.entered} "
            f"({error})"
            for link in self.links
            if link.entered < watch.entered
        }
        for link in self.links:  # nobody asks a stuck rank again: what rank 0 has can be saved at once
            if link.rank in lost:
                link.lose(lost[link.rank])
        if not lost:
            return RankLostError(
                f"the learner ranks do not get on although all have entered ({error}); all ranks have to "
                "start again from the newest checkpoint"
            )
        for link in self.links:
            if link.rank not in lost:
                with contextlib.suppress(RankLostError):  # one more is gone; the first are the cause
                    link.expect_end()
                    link.send("lost", {str(rank): why for rank, why in lost.items()})
        # Collectives on a CPU fail before the optimiser acts, and an answer that never comes finds it done:
        # a whole update, though not counted. Aborted collectives on a GPU leave anything.
        return rank_lost(lost, intact=self.device.type == "cpu")

    def close(self) -> None:
        """Send the others home."""
        for link in self.links:
            if not link.lost:
                link.expect_end()
                with contextlib.suppress(RankLostError):  # gone by itself
                    link.send("end")
        distributed.leave_group()
        for link in self.links:
            link.close()
        watch.lost = distributed.nobody_lost


class RankedAgent:
    """Rank 0's agent for all ranks: implements system.interfaces.Agent.

    A rank that died, fell silent or is stuck is raised as RankLostError that names it: at once, after
    `place.silence` seconds, or when the update takes SLOW_FACTOR times as long as others did.
    """

    def __init__(self, agent: Agent, hub: RankHub, *, metrics: Metrics | None = None) -> None:
        self._agent, self._hub = agent, hub
        self._ranks = hub.place.ranks
        self._metrics = metrics if metrics is not None else Metrics("", "learner")
        self._metrics["learner_ranks"].set(self._ranks)
        self._dealt = False  # whether the others have this agent's state
        self._loaded: Mapping[str, Any] | None = None  # what all ranks had not reported in a loaded state
        self._pace = Pace(hub.place.silence)

    def initial(self, batch: int) -> Any:
        return self._agent.initial(batch // self._ranks)

    def learn(self, sequence: Sequence, carry: Any) -> tuple[Any, dict[str, float], WriteBack | None]:
        """One update on the global batch [B, T]. Raises: RankLostError naming who is gone."""
        own, *others = split_sequence(sequence, self._ranks)
        begun, waited = time.monotonic(), watch.waited
        try:
            self._deal()
            for link, part in zip(self._hub.links, others, strict=True):
                link.send("learn", *split_state(state_of(part)), reused=True)
            carry, values, rows = self._agent.learn(own, carry)
            answers = [self._hub.answer(link, "done") for link in self._hub.links]
        except (CollectiveError, RankLostError) as error:
            raise self._hub.blame(error) from error
        self._pace.add(time.monotonic() - begun)
        waits = [watch.waited - waited, *(float(answer.tree["waited"]) for answer in answers)]
        for rank, seconds in enumerate(waits):
            self._metrics.labels("learner_rank_wait_seconds", rank=str(rank)).set(seconds)
        return carry, values, join_write_backs([rows, *map(_rows_of, answers)])

    def weights(self) -> dict[str, NDArray[np.generic]]:
        return self._agent.weights()

    def state(self) -> dict[str, Any]:
        """Rank 0's state, which is that of all. Raises: InfrastructureError when a rank has drifted."""
        state = self._agent.state()
        if self._hub.lost:
            return {name: value for name, value in state.items() if name != PENDING}
        try:
            self._deal()
            self._compare()
            return self._whole(state)
        except (CollectiveError, RankLostError) as error:
            raise self._hub.blame(error) from error

    def load(self, state: Mapping[str, Any]) -> None:
        """Also what one rank or another number of them saved."""
        self._agent.load(state_part(state, 0, self._ranks))
        self._loaded, self._dealt = state.get(PENDING), False

    def close(self) -> None:
        """Send the other ranks home. The agent itself stays."""
        self._hub.close()

    def _deal(self) -> None:
        """Give the others this agent's state, unless they have it."""
        if self._dealt:
            return
        state = self._agent.state()
        if self._loaded is not None:
            state |= {PENDING: self._loaded}
        for link in self._hub.links:
            link.send("load", *split_state(state_part(state, link.rank, self._ranks)))
        self._loaded, self._dealt = None, True

    def _compare(self) -> None:
        for link in self._hub.links:
            link.send("digest")
        mine = weights_digest(self._agent)
        for link in self._hub.links:
            theirs = self._hub.answer(link, "digest").tree
            if theirs != mine:
                raise InfrastructureError(
                    f"the weights of learner rank {link.rank} ({theirs:08x}) must equal those of rank 0 "
                    f"({mine:08x}) and do not; all ranks start again from the newest checkpoint. If it "
                    "happens again, give all ranks the same kind of device and the same torch"
                )

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what all ranks have not yet reported, where agents report late."""
        pending = state.get(PENDING)
        if pending is None or pending["rows"] is None:
            return state
        for link in self._hub.links:
            link.send("pending")
        answers = [self._hub.answer(link, "pending") for link in self._hub.links]
        rows = join_write_backs([write_back_of(pending["rows"]), *map(_rows_of, answers)])
        assert rows is not None
        return state | {PENDING: {**pending, "rows": state_of(rows)}}


class RankWorker:
    """Every rank but 0: does what rank 0 says, in one thread. Make it, make the agent, then serve."""

    def __init__(self, place: RankPlace, device: torch.device) -> None:
        """Join rank 0 and form the group. Raises: RankLostError, InfrastructureError."""
        assert 0 < place.rank < place.ranks, place
        self._place = place
        self._pace = Pace(place.silence)
        self.updates = 0
        self.waited = 0.0  # seconds inside collectives of the last update
        self._link = join_rank_zero(
            place.host, place.port, place.rank, place.secret, seconds=place.join_seconds, make=self._make
        )
        watch.lost = lambda: self._link.over
        message = self._link.receive(place.join_seconds)
        if message is None:
            raise rank_lost({0: f"it did not form a group within {place.join_seconds:g} s"})
        if message.op == "lost":
            raise _told(message)
        assert message.op == "group", message.op
        join_group(place.rank, place.ranks, device, place.host, int(message.tree), place.join_seconds)
        log.info("rank joined", extra={"rank": place.rank, "ranks": place.ranks, "device": str(device)})

    def _make(self, connection: socket.socket, rank: int) -> RankLink:
        return RankLink(connection, rank, silence=self._place.silence, entered=_entered, on_lost=_note_lost)

    def serve(self, agent: Agent, seconds: float) -> bool:
        """Work for about that long; False once rank 0 has said that this was all.

        Raises: RankLostError when rank 0 or, by its word, another rank is lost; what the agent raises.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            message = self._link.receive(left)
            if message is None:
                break
            if message.op == "end":
                return False
            try:
                self._do(agent, message)
            except CollectiveError as error:
                raise self._verdict(error) from error
            except RankLostError:
                raise
            except Exception as error:  # rank 0 cannot see it otherwise
                with contextlib.suppress(RankLostError):
                    self._link.send("failed", f"{type(error).__name__}: {error}")
                raise
        return True

    def close(self) -> None:
        distributed.leave_group()
        self._link.close()
        watch.lost = distributed.nobody_lost

    def _do(self, agent: Agent, message: Message) -> None:
        if message.op == "learn":
            self._learn(agent, message)
        elif message.op == "load":
            agent.load(join_state(message.tree, message.arrays))
        elif message.op == "digest":
            self._link.send("digest", weights_digest(agent))
        elif message.op == "pending":
            tree, arrays = split_state(agent.state()[PENDING]["rows"])
            self._link.send("pending", {"rows": tree}, arrays)
        else:
            assert message.op == "lost", message.op
            raise _told(message)

    def _learn(self, agent: Agent, message: Message) -> None:
        sequence = sequence_of(join_state(message.tree, message.arrays))
        begun, waited = time.monotonic(), watch.waited
        rows = agent.learn(sequence, agent.initial(sequence.shape[0]))[2]
        self._pace.add(time.monotonic() - begun)
        self.updates += 1
        self.waited = watch.waited - waited
        tree, arrays = split_state({} if rows is None else state_of(rows))
        self._link.send("done", {"rows": tree, "waited": self.waited}, arrays, reused=True)

    def _verdict(self, error: CollectiveError) -> RankLostError:
        """Who is gone: rank 0 itself, or whom it names."""
        with contextlib.suppress(RankLostError):  # it may have said so and left
            self._link.send("broken", str(error))
        deadline = time.monotonic() + self._place.silence + BLAME_SECONDS
        try:
            while time.monotonic() < deadline:
                message = self._link.receive(deadline - time.monotonic())
                if message is not None and message.op == "lost":
                    return _told(message)
        except RankLostError as lost:
            return lost
        return RankLostError(f"rank 0 does not say who is lost ({error}); see its log")


def _entered() -> int:
    return watch.entered


def _note_lost(rank: int, why: str) -> None:
    log.error("rank lost", extra={"rank": rank, "why": why})
    distributed.break_group()


def _told(message: Message) -> RankLostError:
    return rank_lost({int(rank): str(why) for rank, why in message.tree.items()})


def _rows_of(answer: Message) -> WriteBack | None:
    tree = answer.tree["rows"]
    return write_back_of(join_state(tree, answer.arrays)) if tree else None
