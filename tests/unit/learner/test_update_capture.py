"""The whole update as something a device can repeat by itself: no host in it, replays equal direct calls."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learner.backends import TORCH
from learner.capture import GraphedStep, make_recorder
from learner.catalog import make_config, overlay_columns
from learner.families.dreamer.agent import DreamerAgent
from learner.families.dreamer.behavior import ActorCritic
from learner.families.dreamer.update import DreamerUpdate
from learner.families.dreamer.world_model import DreamerWorldModel
from learner.nn.bptt import posterior_rollout
from learner.nn.optim import FlatParameters, LaProp
from system.experience import Sequence
from system.specs import ActionSpec, ArraySpec, EnvSpec
from tests.unit.learner.tape import NoHost, TapeRecorder
from tests.unit.learner.test_dreamer_agent import TINY, draw, mixed_env, replaced, vector_env

META = torch.device("meta")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other threads compute is not on the tape; what is for CPUs alone runs as where graphs are."""
    for module in ("encoder", "decoder"):
        monkeypatch.setattr(f"learner.nn.{module}.trainable", lambda x: False)
    monkeypatch.setattr("learner.backends.TORCH", TORCH._replace(rollout=posterior_rollout))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arm_env() -> EnvSpec:
    obs = {"vector": ArraySpec(shape=(3,), dtype="float32")}
    return EnvSpec(name="arm", obs=obs, action=ActionSpec(kind="continuous", size=2))


def build(
    env: EnvSpec, recorder=None, *, late: bool = False, signal="none", steps=None, **settings
) -> DreamerAgent:
    # A tape records torch operations; compiled regions are none.
    config = make_config("dreamer", TINY | {"warmup": 3, "backend": "torch"} | settings)
    return DreamerAgent(
        config,
        env,
        device=torch.device("cpu"),
        seed=0,
        late=late,
        recorder=recorder,
        steps=steps,
        priority_signal=signal,
    )


def batches(env: EnvSpec, count: int, **shape) -> list[Sequence]:
    columns = overlay_columns("dreamer", make_config("dreamer", TINY), env)
    return [draw(env, columns, seed=i, **{"batch": 2, "rows": 4, **shape}) for i in range(count)]


def assert_same_state(one: DreamerAgent, other: DreamerAgent) -> None:
    assert torch.equal(one.parameters.values, other.parameters.values)
    assert torch.equal(one.optimiser.rms, other.optimiser.rms)
    assert torch.equal(one.optimiser.momentum, other.optimiser.momentum)
    assert one.optimiser.updates == other.optimiser.updates
    assert torch.equal(one.behavior.returns.pair, other.behavior.returns.pair)
    for a, b in zip(one.behavior.slow.parameters(), other.behavior.slow.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- nothing in an update needs the host ----------------------------------------------------------


@pytest.fixture
def autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch knows no autocast for the meta device: take the CPU's."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: autocast("cpu" if kind == "meta" else kind, *a, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: enabled("cpu" if kind == "meta" else kind))


def update_on_meta(env: EnvSpec, signal: str, dtype: str) -> DreamerUpdate:
    """Weights that have shapes but no numbers: whoever looks at one fails."""
    config = make_config("dreamer", TINY | {"dtype": dtype})
    with META:
        model = DreamerWorldModel(config, env)
        behavior = ActorCritic(config, model.feat_size, env.action)
    model.row_error, behavior.row_error = signal == "model", signal == "value"
    parameters = FlatParameters(nn.ModuleDict({"model": model, "behavior": behavior}), META)
    optimiser = LaProp(
        parameters, lr=1e-3, warmup=9, agc=0.3, agc_floor=1e-3, beta1=0.9, beta2=0.999, eps=1e-20
    )
    return DreamerUpdate(model, behavior, parameters, optimiser, env, bf16=dtype == "bf16")


@pytest.mark.usefixtures("autocast_on_meta")
@pytest.mark.parametrize(
    ("env", "signal", "context", "dtype"),
    [
        (vector_env(), "none", 0, "fp32"),
        (mixed_env(), "model", 1, "bf16"),
        (arm_env(), "value", 1, "fp32"),
    ],
    ids=["vector", "mixed", "continuous"],
)
def test_whole_update_runs_without_numbers_copies_or_draws(env, signal, context, dtype):
    agent = build(env, signal=signal, dtype=dtype)
    (batch,) = batches(env, 1, context=context)
    if signal == "value":
        batch = Sequence(
            columns=batch.columns, ids=batch.ids, context=context, weights=np.full(2, 0.5, np.float32)
        )
    rows = batch.shape[1] - context
    arrays = {name: torch.from_numpy(np.array(x)) for name, x in agent.update.arrays(batch).items()}
    inputs = arrays | agent.update.noise(2, rows, agent.generator)
    expected = agent.update(inputs, context)
    update = update_on_meta(env, signal, dtype)
    empty = {name: torch.empty_like(x, device=META) for name, x in inputs.items()}
    with NoHost():
        outputs = update(empty, context)
    assert {k: (x.shape, x.dtype) for k, x in outputs.items()} == {
        k: (x.shape, x.dtype) for k, x in expected.items()
    }
    assert all(x.device == META for x in outputs.values())
    assert update.names == agent.update.names


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: x.sum().item(), "reads a value"),
        (lambda x: x if x.sum() else None, "reads a value"),
        (lambda x: x[x > 0], "depends on values"),
        (lambda x: x.nonzero(), "depends on values"),
        (lambda x: x.new_tensor([1.0, 2.0]), "numbers on the host"),
        (lambda x: x + torch.tensor(2.0), "numbers on the host"),
        (lambda x: x.to("meta"), "copies between"),
        (lambda x: torch.empty(3, device="meta").copy_(x), "copies between"),
        (lambda x: x.repeat_interleave(torch.zeros(3, dtype=torch.int64)), "depends on values"),
        (lambda x: x + torch.rand(3), "draws"),
    ],
)
def test_guard_sees_what_a_capture_would_refuse(call: Callable[[Tensor], object], why: str):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=why), NoHost():
        call(x)


# ---- replays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [vector_env(), mixed_env(), arm_env()], ids=["vector", "mixed", "continuous"])
def test_replayed_updates_equal_direct_ones_bit_for_bit(env):
    recorder = TapeRecorder()
    direct, replaying = build(env, signal="value"), build(env, recorder, signal="value")
    for i, batch in enumerate(batches(env, 4)):
        one, other = (agent.learn(batch, {}) for agent in (direct, replaying))
        assert one[1] == other[1], i
        for name, latents in one[2].columns.items():
            np.testing.assert_array_equal(latents, other[2].columns[name])
        np.testing.assert_array_equal(one[2].priority, other[2].priority)
    assert (recorder.warmed, recorder.recorded, replaying._step.replays) == (1, 1, True)
    assert_same_state(direct, replaying)


def test_replays_skip_what_is_not_finite_and_go_on_as_direct_calls_do():
    env = vector_env()
    good = batches(env, 4)
    spoilt = replaced(good[2], vector=good[2].columns["vector"] * np.float32("nan"))
    direct, replaying = build(env), build(env, TapeRecorder())
    for batch in (*good[:2], spoilt, *good[2:]):
        one, other = (agent.learn(batch, {}) for agent in (direct, replaying))
        assert one[1]["nonfinite"] == other[1]["nonfinite"] == float(batch is spoilt)
        assert (one[2] is None) == (other[2] is None) == (batch is spoilt)
    assert direct.optimiser.updates == 4
    assert_same_state(direct, replaying)


def test_state_moves_between_replaying_and_direct_agents_bit_for_bit():
    env = vector_env()
    straight, replaying = build(env), build(env, TapeRecorder())
    several = batches(env, 5)
    for batch in several[:3]:
        straight.learn(batch, {})
        replaying.learn(batch, {})
    loaded = build(env)
    loaded.load(replaying.state())
    replaying.load(straight.state())  # into the tensors that the recording works on
    for batch in several[3:]:
        for agent in (straight, loaded, replaying):
            agent.learn(batch, {})
    assert_same_state(straight, loaded)
    assert_same_state(straight, replaying)


def test_new_shapes_are_warmed_up_and_recorded_again():
    env = vector_env()
    recorder = TapeRecorder()
    direct, replaying = build(env), build(env, recorder)
    for batch in (*batches(env, 3), *batches(env, 3, batch=3), *batches(env, 3, context=0)):
        assert direct.learn(batch, {})[1] == replaying.learn(batch, {})[1]
    assert (recorder.warmed, recorder.recorded) == (3, 3)
    assert_same_state(direct, replaying)


class RefusingRecorder(TapeRecorder):
    def record(self, call):
        self.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing")


def test_recording_that_fails_is_logged_once_and_updates_go_on(caplog: pytest.LogCaptureFixture):
    env = vector_env()
    recorder = RefusingRecorder()
    direct, falling = build(env), build(env, recorder)
    for batch in batches(env, 4):
        assert direct.learn(batch, {})[1] == falling.learn(batch, {})[1]
    assert recorder.recorded == 1
    (line,) = (r for r in caplog.records if "not captured" in r.message)
    assert "not permitted" in line.why
    assert_same_state(direct, falling)


def test_outputs_of_a_replay_outlive_the_next_one():
    step = GraphedStep(lambda inputs: {"y": inputs["x"] * 2.0}, TapeRecorder())
    outputs = [step({"x": torch.full((3,), x)})["y"] for x in (1.0, 2.0, 3.0, 4.0)]
    assert step.replays
    assert [y.tolist() for y in outputs] == [[2.0] * 3, [4.0] * 3, [6.0] * 3, [8.0] * 3]


def test_nothing_is_recorded_on_cpus():
    assert make_recorder(torch.device("cpu"), "auto") is None


# ---- results one update late ----------------------------------------------------------------------


def test_late_agent_reports_the_same_one_call_later():
    env = vector_env()
    now, late = build(env), build(env, late=True)
    several = batches(env, 5)
    reports = [now.learn(batch, {})[1:] for batch in several]
    late_reports = [late.learn(batch, {})[1:] for batch in several]
    assert late_reports[0] == ({}, None)
    for (metrics, rows), (late_metrics, late_rows) in zip(reports, late_reports[1:], strict=False):
        assert metrics == late_metrics
        assert rows.ids is late_rows.ids
        np.testing.assert_array_equal(rows.columns["deter"], late_rows.columns["deter"])
    assert_same_state(now, late)


def test_what_a_late_agent_has_not_reported_yet_survives_a_checkpoint():
    env = vector_env()
    straight, halves = build(env, late=True), build(env, late=True)
    several = batches(env, 6)
    for batch in several[:3]:
        straight.learn(batch, {})
        halves.learn(batch, {})
    resumed = build(env, late=True)
    resumed.load(halves.state())
    for batch in several[3:]:
        one, other = (agent.learn(batch, {}) for agent in (straight, resumed))
        assert one[1] == other[1]
        np.testing.assert_array_equal(one[2].ids.start, other[2].ids.start)
        np.testing.assert_array_equal(one[2].columns["stoch"], other[2].columns["stoch"])
    assert_same_state(straight, resumed)
    assert "pending" not in build(env).state()
