"""The optimiser trace (AGC, then LaProp) against float64."""

import numpy as np
import pytest
import torch
from torch import nn

from learner.nn.optim import FlatParameters, LaProp

SETTINGS = {
    "lr": 0.01,
    "warmup": 4,
    "agc": 0.3,
    "agc_floor": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-20,
}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.zeros = nn.Parameter(torch.zeros(5))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def reference_trace(start, grads):
    """Float64 parameters after every update; `start` and each of `grads` are lists of arrays."""
    params = [p.astype(np.float64) for p in start]
    rms, momentum = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    trace = []
    for step, gradient in enumerate(grads, start=1):
        for i, g in enumerate(gradient):
            limit = 0.3 * max(1e-3, np.sqrt((params[i] ** 2).sum()))
            g = g / max(1.0, np.sqrt((g**2).sum()) / limit)
            rms[i] = 0.999 * rms[i] + 0.001 * g**2
            scaled = g / (np.sqrt(rms[i] / (1 - 0.999**step)) + 1e-20)
            momentum[i] = 0.9 * momentum[i] + 0.1 * scaled
            rate = 0.01 * min(1.0, (step - 1) / 4)  # the first update has rate 0
            params[i] = params[i] - rate * momentum[i] / (1 - 0.9**step)
        trace.append([p.copy() for p in params])
    return trace


def test_ten_updates_equal_the_float64_trace():
    module = Two()
    flat = FlatParameters(module, torch.device("cpu"))
    optimiser = LaProp(flat, **SETTINGS)
    rng = np.random.default_rng(0)
    grads = [[10.0 ** rng.uniform(-3, 1) * rng.normal(size=s) for s in ((4, 3), (5,))] for _ in range(10)]
    expected = reference_trace([module.matrix.detach().numpy(), module.zeros.detach().numpy()], grads)
    for gradient, after in zip(grads, expected, strict=True):
        flat.grads.zero_()
        for parameter, g in zip((module.matrix, module.zeros), gradient, strict=True):
            (parameter * torch.tensor(g, dtype=torch.float32)).sum().backward()
        optimiser.step()
        np.testing.assert_allclose(module.matrix.detach().numpy(), after[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(module.zeros.detach().numpy(), after[1], rtol=1e-5, atol=1e-7)
    assert module.frozen.tolist() == [1.0, 1.0]


def test_clipping_is_per_tensor_and_has_a_floor_for_weights_at_zero():
    module = Two()
    flat = FlatParameters(module, torch.device("cpu"))
    optimiser = LaProp(flat, **(SETTINGS | {"beta2": 0.0, "beta1": 0.0}))
    module.matrix.grad.fill_(1e-6)
    module.zeros.grad.fill_(2.0)
    optimiser.step()
    moments = optimiser.rms.split(flat.sizes)
    assert moments[0].tolist() == pytest.approx([1e-12] * 12)  # untouched
    # norm 0.3 * 1e-3 spread over five equal entries
    assert moments[1].tolist() == pytest.approx([(3e-4) ** 2 / 5] * 5, rel=1e-4)


def test_warmup_is_linear_from_zero():
    optimiser = LaProp(FlatParameters(Two(), torch.device("cpu")), **SETTINGS)
    assert [optimiser.rate(n) for n in (0, 1, 4, 100)] == pytest.approx([0.0, 0.0025, 0.01, 0.01])


def test_parameters_and_gradients_are_views_of_the_flat_buffers():
    module = Two()
    flat = FlatParameters(module, torch.device("cpu"))
    flat.values.fill_(3.0)
    assert module.matrix.unique().tolist() == [3.0]
    module.zeros.sum().backward()
    assert flat.grads.tolist() == [0.0] * 12 + [1.0] * 5
