"""Compiled regions give what their references give, and the same bits whatever the number of threads."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from learner.native.actor_critic import actor_critic
from learner.native.imagine import CHUNK, imagine
from learner.native.library import absence, available
from learner.native.rollout import posterior_rollout
from learner.nn.actor_critic import reference_actor_critic
from learner.nn.bptt import CoreWeights, PosteriorWeights, reference_rollout
from learner.nn.imagine import HeadWeights, Imagined, reference_imagine
from learner.nn.twohot import mirrored_bins
from tests.unit.learner.native_cases import FACTORS, POLICIES, Case


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not available():
        pytest.skip(f"no compiled regions: {absence()}")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the difference is below `tolerance` of the expected tensor, both as vectors."""
    return (actual - expected).norm().item() <= tolerance * expected.norm().item() + 1e-9


def leaves(*weights: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.requires_grad_() for group in weights for tensor in group]


def roll(function, case: Case, args, core, posterior, by) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(outputs, gradients by drive, projected and all weights) for the output gradients `by`."""
    inputs = [args[2], args[3], *core, *posterior]
    out = function(*args, core, posterior, 0.01)
    return out, torch.autograd.grad(out, inputs, by)


SIZES = {
    "odd": {"deter": 24, "hidden": 10, "stoch": 5, "classes": 3, "blocks": 2},
    "whole registers": {"deter": 64, "hidden": 32, "stoch": 16, "classes": 4, "blocks": 4},
    "tiny": {"deter": 5, "hidden": 3, "stoch": 1, "classes": 2, "blocks": 1},
    "narrow": {"deter": 4, "hidden": 40, "units": 70, "stoch": 3, "classes": 2, "blocks": 2},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("time", "batch"), [(6, 5), (1, 1), (9, 13)])
def test_rollout_and_its_gradient_are_those_of_autograd(
    size: str, time: int, batch: int, threads: int
) -> None:
    case = Case(**SIZES[size])
    args, core, posterior = case.rollout(time, batch), case.core(), case.posterior()
    leaves((args[2], args[3]), core, posterior)
    by = tuple(
        case.normal(time, batch, *shape)
        for shape in ((case.deter,), (case.classes, case.stoch), (case.classes, case.stoch))
    )
    expected, expected_grads = roll(reference_rollout, case, args, core, posterior, by)
    actual, grads = roll(posterior_rollout, case, args, core, posterior, by)
    assert torch.equal(actual[2], expected[2]), "other classes were sampled"
    assert close(actual[0], expected[0])
    assert close(actual[1], expected[1])
    names = ("drive", "projected", *CoreWeights._fields, *PosteriorWeights._fields)
    for name, grad, reference in zip(names, grads, expected_grads, strict=True):
        assert close(grad, reference), name


def test_rollout_reads_views_and_weights_cut_out_of_larger_ones() -> None:
    case = Case()
    args, core, posterior = case.rollout(4, 6), case.core(), case.posterior()
    plain = posterior_rollout(*args, core, posterior, 0.01)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in args]
    wide = torch.cat([posterior.deter_in, torch.ones(case.hidden, 7)], 1)
    cut = posterior._replace(deter_in=wide[:, : case.deter])
    for x, y in zip(posterior_rollout(*turned, core, cut, 0.01), plain, strict=True):
        assert torch.equal(x, y)


POLICY_DEPTHS = [("normals", (3, 3, 3, 1, 1)), ("categoricals", (2, 3, 1, 1, 2)), ("mixed", (1, 2, 2, 3, 1))]


@pytest.mark.parametrize(("policy", "depths"), POLICY_DEPTHS)
@pytest.mark.parametrize("size", SIZES)
def test_imagination_is_that_of_the_reference(policy: str, depths, size: str, threads: int) -> None:
    case = Case(**SIZES[size])
    dynamics, heads = case.dynamics(), case.heads(POLICIES[policy], depths)
    given = (
        case.starts(CHUNK + 5, 4, POLICIES[policy]),
        dynamics,
        heads,
        POLICIES[policy],
        mirrored_bins(case.bins),
    )
    expected, (actual, _) = reference_imagine(*given), imagine(*given)
    same = (actual.feat[..., case.deter :] == expected.feat[..., case.deter :]).all(-1).all(0)  # [N]
    assert same.float().mean() > 0.95, "only a uniform number on the edge of a class may draw another one"
    for name, x, y in zip(Imagined._fields, actual, expected, strict=True):
        assert close(x[:, same], y[:, same]), name


def test_imagination_overwrites_what_it_is_given() -> None:
    case, policy = Case(), POLICIES["normals"]
    given = (case.dynamics(), case.heads(policy, (2, 2, 2, 1, 1)), policy, mirrored_bins(case.bins))
    first, second = case.starts(6, 3, policy), case.starts(6, 3, policy)
    room = imagine(first, *given)
    before, fresh = [x.clone() for x in room[0]], imagine(second, *given)
    again = imagine(second, *given, room)
    assert not torch.equal(before[0], fresh[0].feat)
    for x, y in zip((*again[0], *again[1].kept), (*fresh[0], *fresh[1].kept), strict=True):
        assert torch.equal(x, y)
    assert again[0].feat.data_ptr() == room[0].feat.data_ptr()


def test_untrained_heads_predict_exactly_zero() -> None:
    case, policy = Case(bins=255), POLICIES["normals"]
    heads = case.heads(policy, (1, 1, 1, 1, 1))
    silent = [head._replace(weight=head.weight * 0, bias=head.bias * 0) for head in heads[1:4]]
    heads = HeadWeights(heads.actor, *silent, heads.cont)
    out, _ = imagine(case.starts(3, 2, policy), case.dynamics(), heads, policy, mirrored_bins(case.bins))
    assert not out.value.any()
    assert not out.slow.any()
    assert not out.reward.any()


def learn(case: Case, policy: str, depths, count: int, horizon: int):
    """Everything that the losses read, and the weights whose gradients are compared."""
    dynamics, heads = case.dynamics(), case.heads(POLICIES[policy], depths)
    imagined, traces = imagine(
        case.starts(count, horizon, POLICIES[policy]),
        dynamics,
        heads,
        POLICIES[policy],
        mirrored_bins(case.bins),
    )
    weights = leaves(*(layer for head in (heads.critic, heads.actor) for layer in head.layers))
    weights += leaves(heads.critic[1:], heads.actor[1:])
    return imagined, traces, heads, weights


@pytest.mark.parametrize(("policy", "depths"), POLICY_DEPTHS)
@pytest.mark.parametrize(("count", "horizon"), [(7, 3), (130, 2)])
def test_losses_and_gradients_are_those_of_autograd(
    policy: str, depths, count: int, horizon: int, threads: int
) -> None:
    case = Case()
    imagined, traces, heads, weights = learn(case, policy, depths, count, horizon)
    targets = case.targets(horizon, count)
    targets.returns[0, 0], targets.returns[0, 1], targets.returns[0, 2] = 0.0, 1e12, -1e12  # bins' ends
    feat = imagined.feat[0].clone().requires_grad_()
    shared = (targets, heads, POLICIES[policy], mirrored_bins(case.bins), FACTORS)
    expected = reference_actor_critic(feat, imagined, *shared)
    total = FACTORS.policy * expected.policy + FACTORS.value * expected.value
    total = total + FACTORS.replay_value * expected.replay_value
    expected_grads = torch.autograd.grad(2.0 * total, [feat, *weights])
    actual_total, actual = actor_critic(feat, imagined, traces, *shared)
    grads = torch.autograd.grad(2.0 * actual_total, [feat, *weights])
    assert close(actual_total, total)
    for name, x, y in zip(type(expected)._fields, actual, expected, strict=True):
        assert close(x, y), name
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert close(grad, reference), tuple(grad.shape)


def test_a_target_that_is_not_finite_does_not_pass_for_a_large_one() -> None:
    case, policy = Case(), "normals"
    imagined, traces, heads, _ = learn(case, policy, (1, 1, 1, 1, 1), 5, 2)
    targets = case.targets(2, 5)
    targets.returns[1, 2] = math.inf
    shared = (targets, heads, POLICIES[policy], mirrored_bins(case.bins), FACTORS)
    total, losses = actor_critic(imagined.feat[0], imagined, traces, *shared)
    assert total.isnan()
    assert losses.policy.isfinite()


def test_no_bit_depends_on_the_number_of_threads() -> None:
    def everything(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        case, policy = Case(seed=3), POLICIES["normals"]
        args, core, posterior = case.rollout(9, 11), case.core(), case.posterior()
        leaves((args[2], args[3]), core, posterior)
        by = (
            case.normal(9, 11, case.deter),
            *(case.normal(9, 11, case.classes, case.stoch) for _ in range(2)),
        )
        out, grads = roll(posterior_rollout, case, args, core, posterior, by)
        imagined, traces, heads, weights = learn(case, "normals", (2, 2, 1, 1, 1), 2 * CHUNK + 3, 3)
        feat = imagined.feat[0].clone().requires_grad_()
        shared = (case.targets(3, 2 * CHUNK + 3), heads, policy, mirrored_bins(case.bins), FACTORS)
        total, losses = actor_critic(feat, imagined, traces, *shared)
        return [*out, *grads, *imagined, *losses, *torch.autograd.grad(total, [feat, *weights])]

    before = torch.get_num_threads()
    try:
        one, again, three = everything(1), everything(1), everything(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    case = Case()
    args, core, posterior = case.rollout(3, 4), case.core(), case.posterior()
    args[2][1, 2, 0] = math.nan
    deter, probs, _ = posterior_rollout(*args, core, posterior, 0.01)
    assert deter[1, 2].isnan().any()
    assert probs[1, 2].isnan().any()
    assert deter[1, [0, 1, 3]].isfinite().all()
