"""The rollout in place gives what the plain loop gives, and leaves to the general one what it cannot do."""

import math

import pytest
import torch
from torch import Tensor

from learner.nn import bptt
from learner.nn.bptt import CoreWeights, PosteriorWeights, reference_rollout
from learner.nn.bptt_rows import posterior_rollout
from tests.unit.learner.native_cases import Case

SIZES = [{}, {"hidden": 9}, {"deter": 5, "blocks": 1, "hidden": 3, "stoch": 1}, {"classes": 2, "blocks": 4}]


def run(
    rollout, case: Case, time: int, batch: int, unimix: float = 0.01
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of everything that has one, for the same numbers at every call."""
    case.generator.manual_seed(7)
    args, core, posterior = list(case.rollout(time, batch)), case.core(), case.posterior()
    wanted = [args[2], args[3], *core, *posterior]
    for leaf in wanted:
        leaf.requires_grad_()
    out = rollout(*args, core, posterior, unimix)
    by = [case.normal(*x.shape) for x in out]
    return list(out), list(torch.autograd.grad(out, wanted, by))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("time", "batch", "unimix"), [(7, 5, 0.01), (1, 3, 0.01), (4, 1, 0.0)])
def test_values_and_gradients_are_those_of_the_plain_loop(sizes, time, batch, unimix):
    case = Case(**sizes)
    expected, expected_grads = run(reference_rollout, case, time, batch, unimix)
    actual, grads = run(posterior_rollout, case, time, batch, unimix)
    assert torch.equal(actual[2], expected[2]), "other classes were sampled"
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()
    names = ("drive", "projected", *CoreWeights._fields, *PosteriorWeights._fields)
    for name, x, y in zip(names, grads, expected_grads, strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm() + 1e-9, name


def test_a_second_way_back_gives_the_same_gradients():
    case = Case()
    args, core, posterior = list(case.rollout(4, 3)), case.core(), case.posterior()
    args[2].requires_grad_()
    deter = posterior_rollout(*args, core, posterior, 0.01)[0]
    by = case.normal(*deter.shape)
    first = torch.autograd.grad(deter, args[2], by, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(deter, args[2], by)[0])


def test_compiled_steps_and_bfloat16_are_left_to_the_general_rollout(monkeypatch):
    asked = []

    def noted(*args, **kwargs):
        asked.append(len(args))
        return general(*args, **kwargs)

    general = bptt.posterior_rollout
    monkeypatch.setattr(bptt, "posterior_rollout", noted)
    case = Case()
    args, core, posterior = case.rollout(3, 2), case.core(), case.posterior()
    posterior_rollout(*args, core, posterior, 0.01)
    assert not asked
    posterior_rollout(*args, core, posterior, 0.01, choose=lambda body, *_: body)
    with torch.autocast("cpu", torch.bfloat16):
        posterior_rollout(*args, core, posterior, 0.01)
    assert len(asked) == 2


def test_what_is_not_a_number_stays_in_its_row():
    case = Case()
    args, core, posterior = case.rollout(3, 4), case.core(), case.posterior()
    args[2][1, 2, 0] = math.nan
    deter, probs, _ = posterior_rollout(*args, core, posterior, 0.01)
    assert deter[1, 2].isnan().any()
    assert probs[1, 2].isnan().any()
    assert deter[1, [0, 1, 3]].isfinite().all()
