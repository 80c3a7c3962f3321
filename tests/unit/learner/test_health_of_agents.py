"""Real agents that learn wrongly in one way each, through the real loop: the alarm for it is raised."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.batches import Batches
from learner.catalog import model_facts
from learner.checkpoint import CheckpointStore
from learner.health.alarms import HealthEvent
from learner.health.settings import HealthSettings
from learner.health.watch import HealthWatch
from learner.loop import LearnerTick, learn_loop, resume
from learner.publish import Publisher
from system.metrics import Metrics
from system.params.memory import MemoryWeights
from tests.unit.learner.line_world import ENV, LineRows, small_agent

HASTE = {
    **{"quiet_updates": 10, "window": 5, "patience": 10, "long_patience": 20},
    **{"probe_updates": 5, "probe_patience": 2},
}
"""Limits are those of every run; only windows are short."""
SIGNATURE = {"family": "dreamer"}


@dataclass
class Watched:
    """One learner of the line world and all that its health monitor said."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    change: Callable[[int, dict[str, np.ndarray]], None] | None = None
    planned: float | None = None
    events: list[HealthEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metrics = Metrics("run", "learner")
        self.agent, latents, config = small_agent(**self.settings)
        self.reader = LineRows(latents, change=self.change)
        self.watch = HealthWatch(
            self.agent,
            HealthSettings(**(HASTE | self.health)),
            model_facts("dreamer", config, ENV),
            planned_updates=self.planned,
            metrics=self.metrics,
        )
        self.store = CheckpointStore(self.root, keep=2)
        self.publisher = Publisher(self.agent, MemoryWeights(), every_updates=1000)
        self.progress = resume(
            self.store, self.agent, self.reader, self.publisher, SIGNATURE, health=self.watch
        )

    def ticks(self, updates: int) -> Iterator[LearnerTick]:
        return learn_loop(
            self.agent,
            Batches(self.reader, 0, 20.0),
            self.publisher,
            self.store,
            signature=SIGNATURE,
            checkpoint_seconds=1e9,
            checkpoint_on_start=False,
            total_updates=updates,
            progress=self.progress,
            health=self.watch,
            metrics=self.metrics,
        )

    def train(self, updates: int, until: frozenset[str] = frozenset()) -> dict[str, HealthEvent]:
        """Train up to so many updates, or until these alarms are all raised; return the first of each."""
        first: dict[str, HealthEvent] = {}
        ticks = self.ticks(updates)
        for tick in ticks:
            self.events += tick.health
            for event in tick.health:
                if event.kind == "raised":
                    first.setdefault(event.raised.alarm, event)
            if until and until <= first.keys():
                ticks.close()
        return first


def scrambled(module: torch.nn.Module) -> None:
    """Weights of the same size that say nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())


def test_healthy_agent_is_silent_until_its_world_model_breaks(tmp_path: Path) -> None:
    calm = {"quiet_updates": 60, "window": 10, "patience": 20, "long_patience": 60}
    watched = Watched(tmp_path, settings={"lr": 4e-3}, health=calm)
    assert watched.train(135) == {}
    assert watched.watch.monitor.values["imagination_drift"] < 1.0, "the model beats copying the last row"
    assert len(watched.watch.monitor.values) == 13, "every alarm but the ratio's was judged"
    scrambled(watched.agent.model.decoder)
    raised = watched.train(220, frozenset({"imagination_drift"}))
    assert set(raised) == {"imagination_drift"}
    assert "best so far 0." in raised["imagination_drift"].raised.detail
    assert watched.metrics.value("learner_health", alarm="imagination_drift") == 1.0
    assert watched.metrics.value("learner_health", alarm="kl_collapse") == 0.0
    assert watched.metrics.value("learner_open_loop_error_ratio", horizon="5") > 1.0


def test_constant_observations_collapse_the_posterior(tmp_path: Path) -> None:
    def blind(_draw: int, columns: dict[str, np.ndarray]) -> None:
        columns["place"][:] = 0.5

    raised = Watched(tmp_path, change=blind).train(200, frozenset({"kl_collapse"}))
    assert raised["kl_collapse"].raised.value < 0.1
    assert "observations" in raised["kl_collapse"].raised.cause


def test_losses_without_weight_are_named_by_what_they_leave_untaught(tmp_path: Path) -> None:
    def always_paid(_draw: int, columns: dict[str, np.ndarray]) -> None:
        columns["reward"][:] = ~columns["is_first"]

    weights = dict.fromkeys(("reconstruction", "reward", "value", "replay_value"), 0.0)
    watched = Watched(tmp_path, {"scales": weights}, {"drift_updates": 10}, always_paid)
    expected = frozenset({"reward_mismatch", "value_mismatch", "gradient_vanishing", "imagination_drift"})
    raised = watched.train(100, expected)
    assert expected <= set(raised)
    assert raised["reward_mismatch"].raised.detail.startswith("imagined 0, replayed 0.9")
    assert raised["value_mismatch"].raised.value == pytest.approx(1.0)
    assert raised["gradient_vanishing"].raised.detail == "decoder, reward, critic"
    assert raised["imagination_drift"].raised.value > 1.0, "never better than copying the last row"


def test_learning_rate_of_1000_explodes_gradient_and_kl(tmp_path: Path) -> None:
    expected = frozenset({"kl_explosion", "gradient_explosion"})
    raised = Watched(tmp_path, {"lr": 1000.0, "warmup": 0}).train(60, expected)
    assert expected <= set(raised)
    assert raised["gradient_explosion"].raised.value > 1e6
    assert raised["gradient_explosion"].raised.detail.startswith("grad_norm")


def test_huge_rewards_saturate_the_return_range(tmp_path: Path) -> None:
    def huge(_draw: int, columns: dict[str, np.ndarray]) -> None:
        columns["reward"] *= 1e9

    raised = Watched(tmp_path, change=huge).train(200, frozenset({"return_saturated"}))
    assert raised["return_saturated"].raised.value > 4.8e7
    assert raised["return_saturated"].raised.detail == "imagined/return"


def test_tiny_rewards_leave_the_return_range_at_its_floor_and_the_policy_random(tmp_path: Path) -> None:
    def tiny(_draw: int, columns: dict[str, np.ndarray]) -> None:
        columns["reward"] *= 1e-5

    expected = frozenset({"return_flat", "entropy_maximum"})
    raised = Watched(tmp_path, {"entropy": 10.0}, change=tiny).train(100, expected)
    # Beside rewards of 1e-5 the noise of an untrained reward head may count as a mismatch: rounding decides.
    assert expected <= set(raised) <= expected | {"reward_mismatch"}
    assert raised["return_flat"].raised.value < 0.01
    assert raised["entropy_maximum"].raised.value > 0.99


def test_policy_without_entropy_bonus_collapses(tmp_path: Path) -> None:
    def paid_for_right(_draw: int, columns: dict[str, np.ndarray]) -> None:
        columns["reward"][:, 1:] = columns["action"][:, :-1, 0]
        columns["reward"][columns["is_first"]] = 0.0

    watched = Watched(tmp_path, {"entropy": 0.0, "lr": 3e-2}, {"probe_updates": 0}, paid_for_right)
    raised = watched.train(300, frozenset({"entropy_collapse"}))
    assert raised["entropy_collapse"].raised.value < 0.005


def test_warmup_longer_than_the_run_is_told_at_once(tmp_path: Path) -> None:
    raised = Watched(tmp_path, {"warmup": 1000}, planned=100.0).train(4)
    assert set(raised) == {"learning_rate"}
    assert raised["learning_rate"].update == 1
    assert raised["learning_rate"].raised.detail == "warmup of 1000 updates, 100 are planned"


def test_nan_reward_is_named_as_input_and_forgotten_in_time(tmp_path: Path) -> None:
    def poisoned(draw: int, columns: dict[str, np.ndarray]) -> None:
        if draw in (3, 4):
            columns["reward"][:2, 5] = np.nan

    watched = Watched(tmp_path, health={"patience": 4}, change=poisoned)
    watched.train(8)
    assert [(event.kind, event.update) for event in watched.events] == [("raised", 3), ("cleared", 7)]
    assert watched.events[0].raised.detail == "input reward (2 entries)"
    assert watched.progress.nonfinite == 2


def test_nan_in_an_observation_and_in_stored_latents_is_told_apart(tmp_path: Path) -> None:
    def poisoned(draw: int, columns: dict[str, np.ndarray]) -> None:
        if draw == 2:
            columns["place"][0, 3, 1] = np.inf
        if draw == 9:
            columns["deter"][0, 0] = np.uint16(0x7FC0)  # NaN in bfloat16

    watched = Watched(tmp_path, health={"patience": 2}, change=poisoned)
    watched.train(10)
    told = [event.raised.detail for event in watched.events if event.kind == "raised"]
    assert told == ["input place (1 entries)", "input stored deter (32 entries)"]


@pytest.mark.parametrize("module", ["encoder", "rssm", "reward", "critic"])
def test_module_whose_weights_broke_is_named(tmp_path: Path, module: str) -> None:
    watched = Watched(tmp_path)
    owner = watched.agent.behavior if module == "critic" else watched.agent.model

    def breaks() -> None:
        next(iter(getattr(owner, module).parameters())).data.view(-1)[0] = np.nan

    steps = watched.ticks(3)
    next(steps)
    breaks()
    event = next(steps).health[0]
    steps.close()
    assert event.raised.alarm == "nonfinite"
    assert event.raised.detail == f"weights of {module}"


def test_module_whose_loss_overflows_is_told_from_one_whose_gradient_does(tmp_path: Path) -> None:
    told = []
    for part in ("heads", ""):  # the last layer alone; all layers, whose norms hide what is huge
        watched = Watched(tmp_path)
        for weight in watched.agent.model.decoder.get_submodule(part).parameters():
            weight.data.mul_(1e25)  # finite, but not its square
        told.append(next(watched.ticks(1)).health[0].raised.detail)
    assert told == ["loss obs/place of decoder", "gradient of decoder; also rssm, encoder"]


def test_resumed_learner_keeps_alarms_and_averages(tmp_path: Path) -> None:
    first = Watched(tmp_path, {"warmup": 1000}, planned=100.0)
    assert set(first.train(4)) == {"learning_rate"}
    again = Watched(tmp_path, {"warmup": 1000}, planned=100.0)
    assert [raised.alarm for raised in again.watch.active] == ["learning_rate"]
    assert again.watch.active[0].since_update == 1
    assert again.watch.state() == json.loads(json.dumps(first.watch.state()))
    assert again.train(8) == {}, "what was told is not told again"


def test_watching_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    weights = []
    for place, enabled in (("with", True), ("without", False)):
        watched = Watched(tmp_path / place, health={"enabled": enabled, "probe_updates": 1})
        watched.train(3)
        weights.append(watched.agent.weights())
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
