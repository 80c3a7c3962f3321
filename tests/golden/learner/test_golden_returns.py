"""Lambda-returns, imagination weights and the return range, by hand and in float64."""

import numpy as np
import pytest
import torch

from learner.returns import ReturnRange, imagination_weights, lambda_return


def test_lambda_return_by_hand():
    # lambda 0.5, discount 0.5, rewards on arrival 1, 2; values 4, 6, 8.
    reward, value = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[4.0, 6.0, 8.0]])
    live, trace = torch.full((1, 3), 0.5), torch.full((1, 3), 0.5)
    last = 2.0 + 0.5 * (0.5 * 8.0 + 0.5 * 8.0)  # R_1 = 6
    first = 1.0 + 0.5 * (0.5 * 6.0 + 0.5 * last)  # R_0 = 4
    assert lambda_return(reward, value, live, trace).tolist() == [[pytest.approx(first), pytest.approx(last)]]


def test_lambda_return_equals_the_sum_of_n_step_returns():
    rng = np.random.default_rng(0)
    horizon, lam = 7, 0.95
    reward, value = rng.normal(size=horizon + 1), rng.normal(size=horizon + 1)
    live = rng.uniform(0.8, 1.0, size=horizon + 1)

    def n_step(t, n):
        total, alive = 0.0, 1.0
        for i in range(1, n + 1):
            total, alive = total + alive * reward[t + i], alive * live[t + i]
        return total + alive * value[t + n]

    def mixture(t):
        left = horizon - t
        parts = [(1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, left)]
        return sum(parts) + lam ** (left - 1) * n_step(t, left)

    ours = lambda_return(
        *(
            torch.tensor(x[None], dtype=torch.float64)
            for x in (reward, value, live, np.full(horizon + 1, lam))
        )
    )
    np.testing.assert_allclose(ours[0].numpy(), [mixture(t) for t in range(horizon)], rtol=1e-10)


def test_return_ends_at_termination_and_bootstraps_at_truncation():
    reward, value = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.0, 10.0, 20.0]])
    discount, lam = 0.9, 0.95
    terminal = lambda_return(reward, value, torch.tensor([[0.9, 0.0, 0.9]]), torch.tensor([[lam, 0.0, lam]]))
    assert terminal[0, 0].item() == pytest.approx(1.0)
    truncated = lambda_return(reward, value, torch.full((1, 3), discount), torch.tensor([[lam, 0.0, lam]]))
    assert truncated[0, 0].item() == pytest.approx(1.0 + 0.9 * 10.0)  # nothing of the next episode's 5


def test_imagination_weights_start_with_the_roots_own_continuation():
    cont = torch.tensor([[1.0, 0.5, 0.5], [0.0, 1.0, 1.0]])  # second start is behind a terminal row
    assert imagination_weights(cont).tolist() == [[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]


def test_return_range_is_an_ema_of_percentiles_with_a_floor():
    values = np.linspace(-3.0, 8.0, 101)
    spread = ReturnRange(0.25, 0.05, 0.95, 1.0)
    low, high = np.percentile(values, 5), np.percentile(values, 95)
    assert spread.update(torch.tensor(values).float()).item() == pytest.approx(0.25 * (high - low), rel=1e-5)
    spread.accept(torch.tensor(True))
    assert spread.update(torch.tensor(values).float()).item() == pytest.approx(
        0.4375 * (high - low), rel=1e-5
    )
    spread.accept(torch.tensor(True))
    assert spread.pair.tolist() == pytest.approx([0.4375 * low, 0.4375 * high], rel=1e-5)
    assert ReturnRange(0.01, 0.05, 0.95, 1.0).update(torch.zeros(10)).item() == 1.0


def test_return_range_forgets_an_update_that_was_not_accepted():
    spread = ReturnRange(0.5, 0.05, 0.95, 1.0)
    spread.update(torch.tensor([0.0, float("nan")]))
    assert spread.pair.tolist() == [0.0, 0.0]
    assert spread.update(torch.linspace(0.0, 10.0, 101)).item() == pytest.approx(4.5, rel=1e-5)
