"""KL losses with free nats, against float64."""

import numpy as np
import pytest
import torch

from learner.nn.categorical import free_nats_kl, mixed_probs, sample_index, sample_one_hot


def softmax(x):
    e = np.exp(x - x.max(-2, keepdims=True))
    return e / e.sum(-2, keepdims=True)


def reference_kl(post, prior):
    return (post * (np.log(post) - np.log(prior))).sum((-2, -1))


def test_kl_is_summed_over_variables_before_the_free_nats():
    # Eight variables of 0.37 nats each: every single one is under the free nat, their sum is not.
    post = np.tile(np.array([[0.9], [0.1]]), (1, 8))
    prior = np.tile(np.array([[0.5], [0.5]]), (1, 8))
    each = reference_kl(post[:, :1], prior[:, :1])
    assert each < 1.0 < 8 * each
    dyn, rep = free_nats_kl(torch.tensor(post[None]), torch.tensor(prior[None]), 1.0)
    assert dyn.item() == pytest.approx(8 * each)
    assert rep.item() == pytest.approx(8 * each)


def test_kl_under_the_free_nats_is_the_free_nats_without_gradient():
    post = torch.full((1, 2, 3), 0.5, dtype=torch.float64, requires_grad=True)
    prior = torch.tensor([[[0.6], [0.4]]], dtype=torch.float64).expand(1, 2, 3).clone().requires_grad_()
    dyn, rep = free_nats_kl(post, prior, 1.0)
    assert dyn.item() == 1.0
    assert rep.item() == 1.0
    (dyn + rep).sum().backward()
    assert torch.count_nonzero(post.grad) == 0
    assert torch.count_nonzero(prior.grad) == 0


def test_dyn_moves_only_the_prior_and_rep_only_the_posterior():
    rng = np.random.default_rng(0)
    post_logits = torch.tensor(4 * rng.normal(size=(2, 4, 5)), requires_grad=True)
    prior_logits = torch.tensor(4 * rng.normal(size=(2, 4, 5)), requires_grad=True)
    post, prior = torch.softmax(post_logits, -2), torch.softmax(prior_logits, -2)
    dyn, rep = free_nats_kl(post, prior, 0.0)
    expected = reference_kl(softmax(post_logits.detach().numpy()), softmax(prior_logits.detach().numpy()))
    np.testing.assert_allclose(dyn.detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(rep.detach().numpy(), expected, rtol=1e-10)
    by_prior = torch.autograd.grad(
        dyn.sum(), [post_logits, prior_logits], retain_graph=True, allow_unused=True
    )
    assert by_prior[0] is None
    # d KL(p || softmax(x)) / dx = softmax(x) - p
    np.testing.assert_allclose(by_prior[1].numpy(), (prior - post).detach().numpy(), rtol=1e-8, atol=1e-12)
    by_post = torch.autograd.grad(rep.sum(), [post_logits, prior_logits], allow_unused=True)
    assert by_post[1] is None
    assert torch.count_nonzero(by_post[0]) > 0


def test_unimix_by_hand():
    probs = mixed_probs(torch.tensor([[100.0], [0.0], [0.0], [0.0]]), 0.01)  # [4 classes, 1 variable]
    assert probs[:, 0].tolist() == pytest.approx([0.9925, 0.0025, 0.0025, 0.0025], abs=1e-7)


def test_inverse_cdf_sampling_by_hand():
    probs = torch.tensor([[0.2], [0.5], [0.3]]).expand(5, 3, 1)
    uniform = torch.tensor([[0.0], [0.19], [0.21], [0.69], [0.71]])
    assert sample_index(probs, uniform)[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_samples_never_leave_the_classes_even_when_probabilities_sum_below_one():
    probs = torch.full((1, 3, 1), 0.3)
    assert sample_index(probs, torch.tensor([[0.9999999]])).item() == 2


def test_gradient_of_a_sample_is_that_of_its_mixed_probabilities():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    weight = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    grads = []
    for straight in (True, False):
        leaf = logits.clone().requires_grad_()
        soft = torch.softmax(leaf, -2)
        value = sample_one_hot(soft, torch.rand(2, 3), 0.01) if straight else 0.99 * soft + 0.01 / 4
        (weight * value).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-7)
