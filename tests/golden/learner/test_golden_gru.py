"""Block GRU step and posterior from the equations in float64; the written-out gradient of the loop."""

import numpy as np
import pytest
import torch

from learner.nn.bptt import CoreWeights, PosteriorWeights, posterior_rollout, reference_rollout
from learner.nn.layers import initialise
from learner.nn.rssm import RSSM, RSSMSizes

B, A, E = 3, 2, 5
SIZES = RSSMSizes(deter=12, hidden=8, stoch=3, classes=4, blocks=2, unimix=0.01, prior_layers=2)


@pytest.fixture
def rssm():
    module = RSSM(SIZES, A, E)
    generator = torch.Generator().manual_seed(0)
    initialise(module, generator)
    with torch.no_grad():
        for parameter in module.parameters():  # also biases and scales off their initial values
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def norm_silu(x, scale):
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale
    return y * sigmoid(y)


def array(tensor):
    return tensor.detach().double().numpy()


def linear(layer, x):
    return x @ array(layer.weight).T + array(layer.bias)


def block_linear(layer, x):
    """Dense equivalent of the block-diagonal map."""
    weight = array(layer.weight)
    blocks, inputs, outputs = weight.shape
    dense = np.zeros((blocks * inputs, blocks * outputs))
    for g in range(blocks):
        dense[g * inputs : (g + 1) * inputs, g * outputs : (g + 1) * outputs] = weight[g]
    return x @ dense + array(layer.bias)


def reference_step(rssm, deter, stoch, action):
    """GRU with 2 blocks: every block reads its own part of deter and all three embedded inputs."""
    core = rssm.core
    action = action / np.maximum(1.0, np.abs(action))
    inputs = [
        norm_silu(linear(core.deter_in, deter), array(core.deter_norm.scale)),
        norm_silu(linear(core.stoch_in, stoch), array(core.stoch_norm.scale)),
        norm_silu(linear(core.action_in.linear[0], action), array(core.action_in.norm[0].scale)),
    ]
    half = SIZES.deter // 2
    x = np.concatenate([deter[:, :half], *inputs, deter[:, half:], *inputs], -1)
    x = norm_silu(block_linear(core.hidden, x), array(core.norm.scale))
    gates = block_linear(core.gates, x).reshape(len(deter), 2, 3, half)
    reset, candidate, update = (gates[:, :, i].reshape(len(deter), -1) for i in range(3))
    update = sigmoid(update - 1.0)
    return update * np.tanh(sigmoid(reset) * candidate) + (1.0 - update) * deter


def reference_posterior(rssm, deter, tokens):
    part = rssm.posterior
    x = norm_silu(linear(part.linear, np.concatenate([deter, tokens], -1)), array(part.norm.scale))
    logits = linear(part.logits, x).reshape(len(deter), SIZES.classes, SIZES.stoch)
    e = np.exp(logits - logits.max(-2, keepdims=True))
    return 0.99 * e / e.sum(-2, keepdims=True) + 0.01 / SIZES.classes


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_one_filtered_row_equals_the_equations(rssm):
    deter, tokens, action = draw((B, 12), 1), draw((B, 1, E), 2), 2.0 * draw((B, 1, A), 3)
    stoch = torch.softmax(draw((B, 4, 3), 4), -2)
    uniform = torch.full((B, 1, 3), 0.5)
    carry, states = rssm.observe(
        {"deter": deter, "stoch": stoch}, tokens, action, torch.zeros(B, 1, dtype=torch.bool), uniform
    )
    expected = reference_step(rssm, array(deter), array(stoch.flatten(1)), array(action[:, 0]))
    np.testing.assert_allclose(array(states["deter"][:, 0]), expected, rtol=1e-4, atol=1e-5)
    probs = reference_posterior(rssm, expected, array(tokens[:, 0]))
    np.testing.assert_allclose(array(states["probs"][:, 0]), probs, rtol=1e-4, atol=1e-5)
    chosen = (np.cumsum(probs, -2) < 0.5).sum(-2)  # inverse CDF
    np.testing.assert_array_equal(states["stoch"][:, 0].argmax(-2).numpy(), chosen)
    assert torch.equal(carry["deter"], states["deter"][:, 0])


def test_is_first_forgets_state_and_previous_action(rssm):
    is_first = torch.tensor([[True], [False], [True]])
    tokens, uniform = draw((B, 1, E), 2), torch.rand(B, 1, 3, generator=torch.Generator().manual_seed(5))
    carry = {"deter": draw((B, 12), 1), "stoch": torch.softmax(draw((B, 4, 3), 4), -2)}
    dirty = rssm.observe(carry, tokens, draw((B, 1, A), 3), is_first, uniform)[1]
    clean = rssm.observe(rssm.initial(B), tokens, torch.zeros(B, 1, A), is_first, uniform)[1]
    for key in ("deter", "stoch", "probs"):
        assert torch.equal(dirty[key][[0, 2]], clean[key][[0, 2]])
    assert not torch.equal(dirty["deter"][1], clean["deter"][1])


def test_many_rows_at_once_equal_one_row_at_a_time(rssm):
    time = 5
    tokens, action = draw((B, time, E), 1), draw((B, time, A), 2)
    is_first = torch.rand(B, time, generator=torch.Generator().manual_seed(3)) < 0.3
    uniform = torch.rand(B, time, 3, generator=torch.Generator().manual_seed(4))
    carry, states = rssm.observe(rssm.initial(B), tokens, action, is_first, uniform)
    one = rssm.initial(B)
    for t in range(time):
        row = slice(t, t + 1)
        one, _ = rssm.observe(one, tokens[:, row], action[:, row], is_first[:, row], uniform[:, row])
    assert torch.allclose(one["deter"], carry["deter"], atol=1e-6)
    assert torch.equal(one["stoch"], states["stoch"][:, -1])


def test_written_out_gradient_equals_autograd_through_the_loop(rssm):
    time = 6
    core, _ = rssm.core.weights()
    inputs = {"drive": draw((time, B, 12), 1), "projected": draw((time, B, 8), 2)}
    keep = (torch.rand(time, B, 1, generator=torch.Generator().manual_seed(3)) > 0.3).float()
    uniform = torch.rand(time, B, 3, generator=torch.Generator().manual_seed(4))
    outer = [draw((time, B, 12), 5), draw((time, B, 4, 3), 6), draw((time, B, 4, 3), 7)]
    results = []
    for rollout in (reference_rollout, posterior_rollout):
        leaves = [
            x.detach().clone().requires_grad_() for x in (*inputs.values(), *core, *rssm.posterior.weights())
        ]
        out = rollout(
            draw((B, 12), 8),
            torch.softmax(draw((B, 4, 3), 9), -2).flatten(1),
            *leaves[:2],
            keep,
            uniform,
            CoreWeights(*leaves[2:12]),
            PosteriorWeights(*leaves[12:]),
            0.01,
        )
        results.append((out, torch.autograd.grad(out, leaves, outer)))
    names = [
        *inputs,
        *(f"core.{n}" for n in CoreWeights._fields),
        *(f"posterior.{n}" for n in PosteriorWeights._fields),
    ]
    for plain, fast in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(plain, fast)
    for name, plain, fast in zip(names, results[0][1], results[1][1], strict=True):
        error = (plain - fast).abs().max() / plain.abs().max()
        assert error < 2e-5, (name, float(error))
