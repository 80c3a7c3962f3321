"""Two-hot codes and symlog, against a float64 implementation over sorted bins."""

import numpy as np
import pytest
import torch

from learner.nn.twohot import TwoHot, mirrored_bins, symexp, symlog, twohot

COUNT = 255


def sorted_bins():
    grid = np.linspace(-20.0, 20.0, COUNT)
    return np.sign(grid) * np.expm1(np.abs(grid))


def layout(sorted_values):
    """Values of sorted bins in the order zero, upper, lower."""
    half = COUNT // 2
    return np.concatenate([sorted_values[half:], sorted_values[:half][::-1]])


def dense_code(target, bins):
    """Two-hot vector [K] over sorted bins, interpolated in raw space."""
    code = np.zeros(len(bins))
    if target <= bins[0]:
        code[0] = 1.0
    elif target >= bins[-1]:
        code[-1] = 1.0
    else:
        above = int(np.searchsorted(bins, target, side="right"))
        share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
        code[above - 1], code[above] = 1.0 - share, share
    return code


def test_symlog_and_symexp_by_hand():
    e = np.e
    x = torch.tensor([0.0, e - 1.0, -(e**2 - 1.0)])
    assert symlog(x).tolist() == pytest.approx([0.0, 1.0, -2.0], abs=1e-6)
    assert symexp(torch.tensor([0.0, 1.0, -2.0])).tolist() == pytest.approx(x.tolist(), abs=1e-5)


def test_bins_are_symexp_spaced_and_exactly_antisymmetric():
    bins = mirrored_bins(COUNT)
    np.testing.assert_allclose(bins.numpy(), layout(sorted_bins()), rtol=2e-6, atol=1e-7)
    assert bins[0] == 0
    assert torch.equal(bins[1:128], -bins[128:])


def test_uniform_logits_mean_exactly_zero():
    code = TwoHot.of(torch.full((3, COUNT), 0.7), mirrored_bins(COUNT))
    assert code.mean().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_target_halfway_between_two_bins_in_raw_space_gets_equal_weights(sign):
    bins = mirrored_bins(COUNT)
    middle = sign * float(bins[40] + bins[41]) / 2  # in symlog space this is not the middle
    index, weight = twohot(torch.tensor([middle]), bins)
    assert weight[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    offset = 0 if sign > 0 else 127
    assert sorted(index[0].tolist()) == [40 + offset, 41 + offset]


def test_codes_equal_the_float64_reference_also_on_bins_and_beyond_them():
    bins = sorted_bins()
    rng = np.random.default_rng(0)
    targets = np.concatenate(
        [rng.normal(size=50), 1e4 * rng.normal(size=50), bins[[3, 127, 200]], [1e12, -1e12]]
    )
    index, weight = twohot(torch.tensor(targets, dtype=torch.float32), mirrored_bins(COUNT))
    for row, target in enumerate(targets):
        ours = np.zeros(COUNT)
        np.add.at(ours, index[row].numpy(), weight[row].numpy())
        reference = layout(dense_code(float(np.float32(target)), bins))
        positions = layout(bins)
        # Compared by what they decode to: on a bin, rounding decides the neighbour of weight 0.
        assert ours.sum() == pytest.approx(1.0, abs=1e-6)
        assert ours @ positions == pytest.approx(reference @ positions, rel=1e-5, abs=1e-6)
        assert np.abs(ours - reference).max() < 2e-2


def test_decoding_inverts_encoding():
    bins = mirrored_bins(COUNT)
    target = torch.tensor([-300.0, -1.5, 0.0, 0.2, 77.0])
    index, weight = twohot(target, bins)
    probs = torch.zeros(5, COUNT).scatter_add_(-1, index, weight)
    mean = TwoHot(probs.log(), probs, bins).mean()
    np.testing.assert_allclose(mean.numpy(), target.numpy(), rtol=1e-5, atol=1e-6)


def test_loss_and_its_gradient_equal_the_float64_reference():
    rng = np.random.default_rng(1)
    raw = 3.0 * rng.normal(size=(4, COUNT))
    first, second = np.array([0.3, -12.0, 0.0, 950.0]), np.array([1.3, 4.0, -0.2, 2.0])
    grad = np.array([1.0, -0.5, 2.0, 0.25])
    logits = torch.tensor(raw, dtype=torch.float32, requires_grad=True)
    loss = TwoHot.of(logits, mirrored_bins(COUNT)).loss(
        torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32), scales=(1.0, 0.5)
    )
    loss.backward(torch.tensor(grad, dtype=torch.float32))
    bins = sorted_bins()
    log_probs = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    codes = np.stack(
        [
            layout(dense_code(a, bins)) + 0.5 * layout(dense_code(b, bins))
            for a, b in zip(first, second, strict=True)
        ]
    )
    np.testing.assert_allclose(loss.detach().numpy(), -(codes * log_probs).sum(-1), rtol=1e-4)
    expected = grad[:, None] * (1.5 * np.exp(log_probs) - codes)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_target_that_is_not_finite_makes_the_loss_nan(bad):
    code = TwoHot.of(torch.zeros(2, COUNT), mirrored_bins(COUNT))
    assert code.loss(torch.tensor([bad, 1.0])).isnan().tolist() == [True, False]


def test_mean_keeps_float32_under_autocast():
    code = TwoHot.of(torch.linspace(-3.0, 3.0, 4 * COUNT).view(4, COUNT).sin(), mirrored_bins(COUNT))
    plain = code.mean()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = code.mean()
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)
