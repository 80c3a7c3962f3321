"""What the learn loop does when another learner rank is lost: it saves what this one has, then says so."""

from pathlib import Path
from typing import Any

import pytest

from learner.batches import Batches
from learner.checkpoint import CheckpointStore
from learner.loop import learn_loop, resume
from learner.publish import Publisher
from system.errors import RankLostError
from system.experience import Sequence
from system.params.memory import MemoryWeights
from tests.unit.learner.toy_learning import LinearAgent, RowReader

SIGNATURE = {"family": "linear"}


class Bereft(LinearAgent):
    """Loses another rank in its fourth update."""

    def __init__(self, *, intact: bool) -> None:
        super().__init__()
        self._left, self._intact = 3, intact

    def learn(self, sequence: Sequence, carry: Any) -> Any:
        if self._left == 0:
            raise RankLostError("learner rank 1 is lost", ranks=(1,), intact=self._intact)
        self._left -= 1
        return super().learn(sequence, carry)


def lose(root: Path, *, intact: bool = True, save_when_lost: bool = True) -> list[int]:
    """Run into the loss; return the updates of all checkpoints."""
    agent, store = Bereft(intact=intact), CheckpointStore(root, keep=5)
    loop = learn_loop(
        agent,
        Batches(RowReader(), 0, 20.0),
        Publisher(agent, MemoryWeights(), every_updates=2),
        store,
        signature=SIGNATURE,
        checkpoint_seconds=1e9,
        save_when_lost=save_when_lost,
    )
    with pytest.raises(RankLostError, match="rank 1"):
        list(loop)
    return [int(path.name.split("-")[1]) for path in store.paths()]


def test_lost_rank_costs_no_update(tmp_path: Path):
    assert lose(tmp_path) == [0, 3]
    agent, weights = LinearAgent(), MemoryWeights()
    progress = resume(
        CheckpointStore(tmp_path, keep=5), agent, RowReader(), Publisher(agent, weights, 2), SIGNATURE
    )
    assert progress.updates == 3
    assert agent.w.any()


def test_agent_that_may_be_half_updated_is_not_saved(tmp_path: Path):
    assert lose(tmp_path, intact=False) == [0]


def test_where_every_batch_counts_only_whole_checkpoints_do(tmp_path: Path):
    assert lose(tmp_path, save_when_lost=False) == [0]
