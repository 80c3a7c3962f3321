"""Torch regions of imagination, actor and critic: references, module path, threads, targets at the edges."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from learner.catalog import make_agent, make_config, overlay_columns
from learner.nn.actor_critic import actor_critic, reference_actor_critic
from learner.nn.imagine import HeadWeights, Imagined, reference_imagine
from learner.nn.imagine_plan import paired, unpaired
from learner.nn.imagine_rows import imagine
from learner.nn.lanes import cut, run_lanes
from learner.nn.twohot import mirrored_bins, symlog
from tests.golden.learner.curves import CASES, draw
from tests.unit.learner.native_cases import FACTORS, POLICIES, Case

DEPTHS = [("normals", (3, 3, 3, 1, 1)), ("categoricals", (2, 3, 1, 1, 2)), ("mixed", (1, 2, 2, 3, 1))]
"""Action distribution, and layers of actor, critic, slow critic, reward and continuation."""


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Difference relative to the expected tensor, both as vectors."""
    return (actual - expected).norm().item() / max(expected.norm().item(), 1e-6)


def world(policy: str, depths: tuple[int, ...], count: int, horizon: int, **sizes: int):
    case = Case(**sizes)
    given = (
        case.dynamics(),
        case.heads(POLICIES[policy], depths),
        POLICIES[policy],
        mirrored_bins(case.bins),
    )
    return case, case.starts(count, horizon, POLICIES[policy]), given


@pytest.mark.parametrize(("policy", "depths"), DEPTHS)
@pytest.mark.parametrize(
    "sizes", [{}, {"hidden": 9, "units": 9}, {"deter": 5, "blocks": 1, "hidden": 3, "stoch": 1}]
)
def test_imagination_is_that_of_the_reference(policy, depths, sizes, threads):
    case, starts, given = world(policy, depths, 300, 4, **sizes)
    expected, (actual, _) = reference_imagine(starts, *given), imagine(starts, *given)
    same = (actual.feat[..., case.deter :] == expected.feat[..., case.deter :]).all(-1).all(0)  # [N]
    assert same.float().mean() > 0.95, "only a uniform number on the edge of a class may draw another one"
    for name, x, y in zip(Imagined._fields, actual, expected, strict=True):
        assert distance(x[:, same], y[:, same]) < 1e-5, name


def test_imagination_overwrites_what_it_is_given():
    case, first, given = world("normals", (2, 2, 2, 1, 1), 6, 3)
    second = case.starts(6, 3, given[2])
    room = imagine(first, *given)
    before, place = room[0].feat.clone(), room[0].feat.data_ptr()
    fresh = imagine(second, *given)
    again = imagine(second, *given, room)
    assert not torch.equal(before, fresh[0].feat)
    for x, y in zip(again[0], fresh[0], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(again[1].logits, fresh[1].logits)
    for x, y in zip(again[1].layers, fresh[1].layers, strict=True):
        assert torch.equal(x.unit, y.unit)
    assert again[0].feat.data_ptr() == place


def test_untrained_heads_predict_exactly_zero():
    _, starts, (dynamics, heads, policy, bins) = world("normals", (1, 1, 1, 1, 1), 3, 2, bins=255)
    silent = [head._replace(weight=head.weight * 0, bias=head.bias * 0) for head in heads[1:4]]
    out, _ = imagine(starts, dynamics, HeadWeights(heads.actor, *silent, heads.cont), policy, bins)
    assert not out.value.any()
    assert not out.slow.any()
    assert not out.reward.any()


def learn(policy: str, depths: tuple[int, ...], count: int, horizon: int):
    """(everything that the losses read, weights whose gradients are compared)."""
    case, starts, (dynamics, heads, distribution, bins) = world(policy, depths, count, horizon)
    imagined, traces = imagine(starts, dynamics, heads, distribution, bins)
    weights = []
    for head in (heads.critic, heads.actor):
        weights += [tensor.requires_grad_() for layer in (*head.layers, head[1:]) for tensor in layer]
    return case, imagined, traces, (heads, distribution, bins, FACTORS), weights


@pytest.mark.parametrize(("policy", "depths"), DEPTHS)
@pytest.mark.parametrize(("count", "horizon"), [(2, 1), (7, 3), (700, 2)])
def test_losses_and_gradients_are_those_of_autograd(policy, depths, count, horizon, threads):
    case, imagined, traces, shared, weights = learn(policy, depths, count, horizon)
    targets = case.targets(horizon, count)
    targets.returns.view(-1)[:2] = torch.tensor([1e12, -1e12])  # beyond the bins' ends
    targets.replay_returns[0] = 0.0
    feat = imagined.feat[0].clone().requires_grad_()
    expected = reference_actor_critic(feat, imagined, targets, *shared)
    total = FACTORS.policy * expected.policy + FACTORS.value * expected.value
    total = total + FACTORS.replay_value * expected.replay_value
    expected_grads = torch.autograd.grad(2.0 * total, [feat, *weights])
    actual_total, actual = actor_critic(feat, imagined, traces, targets, *shared)
    grads = torch.autograd.grad(2.0 * actual_total, [feat, *weights])
    assert distance(actual_total, total) < 1e-5
    for name, x, y in zip(type(expected)._fields, actual, expected, strict=True):
        assert distance(x, y) < 1e-5, name
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert distance(grad, reference) < 1e-5, tuple(grad.shape)


def test_a_target_that_is_not_finite_does_not_pass_for_a_large_one():
    case, imagined, traces, shared, _ = learn("normals", (1, 1, 1, 1, 1), 5, 2)
    targets = case.targets(2, 5)
    targets.returns[1, 2] = math.inf
    total, losses = actor_critic(imagined.feat[0], imagined, traces, targets, *shared)
    assert total.isnan()
    assert losses.policy.isfinite()


def test_no_bit_depends_on_the_number_of_threads():
    def everything(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        case, imagined, traces, shared, weights = learn("normals", (2, 2, 1, 1, 1), 600, 3)
        feat = imagined.feat[0].clone().requires_grad_()
        total, losses = actor_critic(feat, imagined, traces, case.targets(3, 600), *shared)
        return [*imagined, *losses, *torch.autograd.grad(total, [feat, *weights])]

    before = torch.get_num_threads()
    try:
        one, again, three = everything(1), everything(1), everything(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("weighted", [False, True])
def test_both_paths_of_the_behavior_have_the_same_losses_and_gradients(case, weighted):
    settings, env, _ = CASES[case]
    config = make_config("dreamer", settings | {"backend": "torch"})
    agent = make_agent("dreamer", config, env, device="cpu", seed=1)
    behavior = agent.behavior
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for head in (agent.model.reward, behavior.critic, behavior.slow):
            head.logits.bias.copy_(-1.5 * symlog(head.bins.abs()))
            head.logits.weight.normal_(0.0, 0.1, generator=generator)
    columns = overlay_columns("dreamer", config, env)
    sequence = draw(env, columns, 3, weighted=weighted)
    inputs = {name: torch.from_numpy(array.copy()) for name, array in agent.update.arrays(sequence).items()}
    inputs |= agent.update.noise(sequence.shape[0], sequence.shape[1] - 1, agent.generator)
    by_regions, found = behavior._by_regions, {}
    for name, path in (("regions", by_regions), ("modules", behavior._by_modules)):
        behavior._by_regions = path
        losses = agent.update.losses(inputs, 1)
        agent.parameters.grads.zero_()
        losses.total.backward()
        found[name] = (
            losses.metrics,
            [grad.clone() for grad in agent.parameters.views(agent.parameters.grads)],
        )
    assert found["regions"][0].keys() == found["modules"][0].keys()
    for name, value in found["modules"][0].items():
        torch.testing.assert_close(found["regions"][0][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, ours, expected in zip(
        agent.parameters.names, found["regions"][1], found["modules"][1], strict=True
    ):
        assert distance(ours, expected) < 1e-5, name


def test_bfloat16_runs_the_modules(monkeypatch):
    settings, env, _ = CASES["nano-discrete"]
    config = make_config("dreamer", settings | {"dtype": "bf16"})
    agent = make_agent("dreamer", config, env, device="cpu", seed=1)
    monkeypatch.setattr(agent.behavior, "_by_regions", None)
    columns = overlay_columns("dreamer", config, env)
    metrics = agent.learn(draw(env, columns, 0, weighted=True), agent.initial(4))[1]
    assert metrics["nonfinite"] == 0.0


def test_pairing_is_undone():
    bins = mirrored_bins(7)
    assert paired(bins, 9.0).tolist()[4] == 9.0
    upper, lower = paired(bins, 0.0).chunk(2)
    assert torch.equal(upper, -lower)
    assert torch.equal(unpaired(paired(bins, 9.0)), bins)


def test_lanes_keep_their_order_and_their_exceptions():
    assert cut(10, 4) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert cut(10, 16, least=2) == [slice(0, 5), slice(5, 10)]
    assert cut(1, 16, least=2) == [slice(0, 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = run_lanes(lambda part: (part, torch.get_num_threads(), torch.is_grad_enabled()), range(5))
        assert seen == [(part, 1, False) for part in range(5)]
        with pytest.raises(ZeroDivisionError):
            run_lanes(lambda part: 1 // (part - 3), range(5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
