import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.batches import Batches
from learner.checkpoint import CheckpointStore
from learner.loop import LearnerTick, Progress, is_finite, learn_loop, resume
from learner.publish import Publisher
from system.errors import ConfigError, DeadlineError, DivergedError, RejectedError
from system.metrics import Metrics
from system.params.memory import MemoryWeights
from system.weights import NO_VERSION, Weights
from tests.unit.learner.toy_learning import BATCH, CONTEXT, TIME, TRUE_WEIGHTS, LinearAgent, RowReader

ROOT = Path(__file__).resolve().parents[3]
SIGNATURE = {"family": "linear", "obs.vector": [3]}
ROWS_PER_UPDATE = BATCH * (TIME - CONTEXT)
NAN = float("nan")


@dataclass
class Learner:
    """Everything one learner process holds."""

    root: Path
    weights: MemoryWeights = field(default_factory=MemoryWeights)
    agent: LinearAgent = field(default_factory=LinearAgent)
    reader: RowReader = field(default_factory=RowReader)
    metrics: Metrics = field(default_factory=lambda: Metrics("run", "learner"))
    depth: int = 0
    batch_timeout: float = 20.0

    def __post_init__(self) -> None:
        self.store = CheckpointStore(self.root, keep=3)
        self.publisher = Publisher(self.agent, self.weights, every_updates=2)
        self.progress = resume(self.store, self.agent, self.reader, self.publisher, SIGNATURE)

    def ticks(self, total_updates: int | None = None, **options: Any) -> Iterator[LearnerTick]:
        return learn_loop(
            self.agent,
            Batches(self.reader, self.depth, self.batch_timeout),
            self.publisher,
            self.store,
            **{
                "signature": SIGNATURE,
                "checkpoint_seconds": 1e9,
                "total_updates": total_updates,
                "progress": self.progress,
                "metrics": self.metrics,
                **options,
            },
        )


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return Learner(tmp_path)


def test_the_loop_learns_publishes_and_checkpoints(learner: Learner):
    ticks = list(learner.ticks(60))
    assert [tick.progress.updates for tick in ticks] == list(range(1, 61))
    assert ticks[-1].progress.rows_trained == 60 * ROWS_PER_UPDATE
    np.testing.assert_allclose(learner.agent.w, TRUE_WEIGHTS, atol=0.02)
    assert ticks[-1].metrics["loss/total"] < 0.01 < ticks[0].metrics["loss/total"]
    newest = learner.weights.latest(NO_VERSION, 0)
    np.testing.assert_array_equal(newest.arrays["w"], learner.agent.w)
    loaded = learner.store.newest()
    assert loaded.step == 60
    assert loaded.meta["signature"] == SIGNATURE


def test_latents_are_written_back_where_they_were_sampled(learner: Learner):
    list(learner.ticks(30))
    written = np.flatnonzero(learner.reader.latent)
    assert len(written) > 100
    # This agent's latent is its prediction of the reward: rows mixed up would not agree.
    assert np.corrcoef(learner.reader.latent[written], learner.reader.reward[written])[0, 1] > 0.95


def test_metrics_follow_the_ticks(learner: Learner):
    *_, last = learner.ticks(10)
    value = learner.metrics.value
    assert value("learner_updates_total") == 10
    assert value("learner_rows_trained_total") == 10 * ROWS_PER_UPDATE
    assert value("learner_loss", part="total") == pytest.approx(last.metrics["loss/total"])
    assert value("learner_grad_norm") == pytest.approx(last.metrics["grad_norm"])
    assert value("learner_update_seconds_count") == 10
    assert value("learner_checkpoints_total") == 2  # on start and at the end


def test_until_ends_cleanly_with_a_checkpoint(learner: Learner):
    stop = threading.Event()
    for tick in learner.ticks(until=stop.is_set):
        if tick.progress.updates == 7:
            stop.set()
    assert learner.store.newest().step == 7
    assert learner.weights.newest(0) == learner.publisher.version


def test_closing_the_generator_leaves_at_once_without_a_checkpoint(learner: Learner):
    ticks = learner.ticks()
    for _ in range(5):
        next(ticks)
    ticks.close()
    assert learner.store.newest().step == 0


def test_checkpoints_come_when_due(learner: Learner):
    saved = [tick.checkpoint for tick in learner.ticks(5, checkpoint_seconds=0.0)]
    assert [int(path.name.split("-")[1]) for path in saved] == [1, 2, 3, 4, 5]


def test_an_asked_checkpoint_comes_at_once_even_while_waiting_for_data(learner: Learner):
    asked = threading.Event()

    def take() -> bool:
        was = asked.is_set()
        asked.clear()
        return was

    ticks = learner.ticks(checkpoint_asked=take)
    assert [next(ticks).checkpoint for _ in range(3)] == [None, None, None]
    asked.set()
    assert next(ticks).checkpoint.name.endswith("-4")
    assert next(ticks).checkpoint is None
    learner.batch_timeout = 0.05
    learner.reader.open_gate.clear()
    ticks.close()
    ticks = learner.ticks(checkpoint_asked=take)
    assert next(ticks).waiting
    asked.set()
    assert next(ticks).checkpoint.name.endswith("-5")
    ticks.close()


def test_a_failing_periodic_checkpoint_is_postponed_and_training_goes_on(
    learner: Learner, caplog: pytest.LogCaptureFixture
):
    ticks = learner.ticks(20, checkpoint_seconds=0.0)
    assert next(ticks).checkpoint is not None
    hidden = learner.root.rename(learner.root.with_name("unmounted"))
    assert next(ticks).checkpoint is None
    assert "checkpoint postponed" in caplog.text
    hidden.rename(learner.root)
    assert next(ticks).checkpoint is not None
    assert [tick.progress.updates for tick in ticks] == list(range(4, 21))


def test_the_first_version_is_published_before_any_data_and_after_its_epoch_is_saved(learner: Learner):
    learner.reader.open_gate.clear()
    learner.batch_timeout = 0.05
    ticks = learner.ticks()
    assert next(ticks).waiting
    assert learner.store.newest().state["publisher"] == {"epoch": 1, "counter": 0}
    learner.publisher.flush(20.0)
    assert learner.weights.newest(0) == (1, 1)
    ticks.close()


def test_waiting_for_data_ticks_and_says_why(learner: Learner):
    learner.batch_timeout = 0.05
    learner.reader.open_gate.clear()
    ticks = learner.ticks(3)
    first, second = next(ticks), next(ticks)
    assert "prefill" in first.waiting
    assert 0 < first.wait_seconds < second.wait_seconds
    learner.reader.open_gate.set()
    *_, last = ticks
    assert last.progress.updates == 3
    assert last.waiting == ""


def test_starving_for_ever_is_an_error(learner: Learner):
    learner.batch_timeout = 0.05
    learner.reader.open_gate.clear()
    with pytest.raises(DeadlineError, match=r"must have one within 0\.2 s.*prefill"):
        list(learner.ticks(starve_seconds=0.2))


def test_a_non_finite_update_is_skipped_counted_and_not_published(learner: Learner):
    learner.reader.poison = {3: NAN, 6: float("inf")}
    ticks = list(learner.ticks(20))
    assert len(ticks) == 22
    assert ticks[-1].progress.nonfinite == 2
    assert ticks[-1].progress.rollbacks == 0
    assert learner.metrics.value("learner_nonfinite_total") == 2
    assert ticks[-1].progress.updates == 20
    assert np.isfinite(learner.reader.latent).all()


def test_a_streak_of_non_finite_updates_goes_back_to_the_newest_checkpoint(learner: Learner):
    learner.agent.guarded = False
    learner.reader.poison = {10: NAN}  # one poisoned batch ruins this agent for good
    ticks = list(learner.ticks(30, rollback_after=4, checkpoint_seconds=0.0))
    assert ticks[-1].progress.rollbacks == 1
    assert ticks[-1].progress.updates == 30
    assert ticks[-1].progress.nonfinite >= 4
    np.testing.assert_allclose(learner.agent.w, TRUE_WEIGHTS, atol=0.05)
    assert all(np.isfinite(learner.weights.latest(NO_VERSION, 0).arrays["w"]))


def test_ruined_weights_are_neither_saved_nor_published(learner: Learner):
    learner.agent.guarded = False
    learner.reader.poison = {10: NAN}
    ticks = learner.ticks(rollback_after=5, checkpoint_seconds=0.0)
    ruined = [tick for _, tick in zip(range(13), ticks, strict=False) if not is_finite(tick.metrics)]
    assert len(ruined) == 3
    assert not np.isfinite(learner.agent.w).any()
    assert {tick.version for tick in ruined} == {ruined[0].version}
    assert np.isfinite(learner.store.newest().state["agent"]["w"]).all()
    ticks.close()


def test_divergence_that_repeats_after_a_rollback_ends_the_run_and_keeps_the_checkpoint(learner: Learner):
    learner.reader.poison = dict.fromkeys(range(6, 1000), NAN)
    with pytest.raises(DivergedError, match="again after going back"):
        list(learner.ticks(rollback_after=3))
    assert learner.store.newest().step == 0


def test_divergence_without_a_checkpoint_ends_the_run(learner: Learner):
    learner.reader.poison = dict.fromkeys(range(1000), NAN)
    with pytest.raises(DivergedError, match="there is no checkpoint"):
        list(learner.ticks(rollback_after=3, checkpoint_on_start=False))


def test_ending_amid_a_streak_saves_nothing(learner: Learner):
    learner.reader.poison = dict.fromkeys(range(4, 1000), NAN)
    stop = threading.Event()
    for tick in learner.ticks(until=stop.is_set, rollback_after=100):
        if tick.progress.nonfinite == 3:
            stop.set()
    assert learner.store.newest().step == 0


def test_a_learner_that_was_replaced_stops_with_the_refusal(learner: Learner):
    ticks = learner.ticks(100_000)
    for _ in range(4):
        next(ticks)
    learner.publisher.flush(20.0)
    learner.weights.publish(Weights.of(learner.publisher.version._replace(epoch=9), {"w": np.zeros(3)}))
    with pytest.raises(RejectedError, match="another learner"):
        list(ticks)


@pytest.mark.parametrize("depth", [0, 3])
def test_resuming_continues_bit_for_bit(tmp_path: Path, depth: int):
    straight = Learner(tmp_path / "straight", depth=depth)
    list(straight.ticks(100))
    list(Learner(tmp_path / "halves", depth=depth).ticks(50))
    second = Learner(tmp_path / "halves", depth=depth)
    assert second.progress == Progress(updates=50, rows_trained=50 * ROWS_PER_UPDATE)
    list(second.ticks(100))
    assert second.agent.w.tobytes() == straight.agent.w.tobytes()
    assert second.agent.momentum.tobytes() == straight.agent.momentum.tobytes()
    assert second.store.newest().state["reader"] == straight.store.newest().state["reader"]


KILLED = """
import sys
from pathlib import Path
from tests.unit.learner.test_learn_loop import Learner

for tick in Learner(Path(sys.argv[1])).ticks(1000, checkpoint_seconds=0.0):
    print(tick.progress.updates, flush=True)
"""


def test_kill_9_and_resume_is_the_same_as_never_having_died(tmp_path: Path):
    straight = Learner(tmp_path / "straight")
    list(straight.ticks(100))
    root = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 50:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    heir = Learner(root)
    assert 50 <= heir.progress.updates < 100
    *_, last = heir.ticks(100)
    assert last.version.epoch == 2
    assert heir.agent.w.tobytes() == straight.agent.w.tobytes()
    assert heir.progress == straight.progress


def test_versions_never_go_back_over_resumes_even_without_a_new_checkpoint(tmp_path: Path):
    weights = MemoryWeights()
    versions = []
    for _ in range(4):
        learner = Learner(tmp_path, weights=weights)
        ticks = learner.ticks(checkpoint_on_start=False)
        for _ in range(6):
            next(ticks)
        learner.publisher.flush(20.0)
        ticks.close()
        versions.append(weights.newest(0))
    assert versions == sorted(set(versions))
    assert [version.epoch for version in versions] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    learner = Learner(tmp_path)
    list(learner.ticks(1))
    other = {**SIGNATURE, "obs.vector": [4]}
    with pytest.raises(ConfigError, match=r"obs\.vector is \[3\] in the checkpoint, must be \[4\]"):
        resume(learner.store, learner.agent, learner.reader, learner.publisher, other)


def test_resume_skips_a_broken_checkpoint(tmp_path: Path):
    list(Learner(tmp_path).ticks(5, checkpoint_seconds=0.0))
    newest = CheckpointStore(tmp_path, keep=3).paths()[-1]
    (newest / "arrays.safetensors").write_bytes(b"")
    assert Learner(tmp_path).progress.updates == 5  # saved after update 5, and again at the end
    (CheckpointStore(tmp_path, keep=3).paths()[-2] / "state.json").unlink()
    assert Learner(tmp_path).progress.updates == 4


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ({"loss/total": 1.0, "grad_norm": 2.0}, True),
        ({"loss/total": NAN}, False),
        ({"loss/total": 1.0, "grad_norm": float("inf")}, False),
        ({"loss/total": 1.0, "nonfinite": 1.0}, False),
        ({"loss/total": 1.0, "nonfinite": 0.0, "imagined/return": NAN}, True),  # a statistic, not a loss
        ({}, True),
    ],
)
def test_only_losses_and_gradients_decide_whether_an_update_counts(values: dict[str, float], finite: bool):
    assert is_finite(values) == finite
