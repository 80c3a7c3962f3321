"""Returns: lambda-returns over imagined and replayed rows, imagination weights, the return-range normaliser.

Source: arXiv 2301.04104, "Critic learning" and "Actor learning". Rows follow `system.experience`: reward_t
and live_t were received on arriving at t. Letters: N sequences, H steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learner.distributed import gather_over_ranks


def lambda_return(reward: Tensor, value: Tensor, live: Tensor, trace: Tensor) -> Tensor:
    """R_t = r_{t+1} + live_{t+1} ((1 - trace_{t+1}) v_{t+1} + trace_{t+1} R_{t+1}), R_H = v_H.

    Shapes: all [N, H + 1], result [N, H]. `live` is the continuation times the discount: zero where the
    return ends. `trace` is lambda, and zero on rows after which the next row is another episode.
    """
    assert reward.shape == value.shape == live.shape == trace.shape, (reward.shape, value.shape)
    fixed = (reward + live * (1.0 - trace) * value)[:, 1:].unbind(1)
    carried = (live * trace)[:, 1:].unbind(1)
    out = [value[:, -1]]
    for step in reversed(range(len(fixed))):
        out.append(torch.addcmul(fixed[step], carried[step], out[-1]))
    return torch.stack(out[:0:-1], 1)


def imagination_weights(cont: Tensor) -> Tensor:
    """Probability that imagined row h still counts, the root's own continuation included.

    cont [N, H + 1], predicted continuation times discount, row 0 is the real start state: starts behind
    the end of an episode teach nothing.
    """
    return torch.cumprod(cont, 1)


class ReturnRange(nn.Module):
    """Scale of returns: EMA of their 5th to 95th percentile range over all ranks, never below `floor`.

    Sparse rewards keep scale 1, so noise is not blown up; large returns shrink to about one.
    An update is pending until `accept`: one that is skipped leaves the range as it was.
    """

    pair: Tensor
    pending: Tensor
    quantiles: Tensor

    def __init__(self, rate: float, low: float, high: float, floor: float) -> None:
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("quantiles", torch.tensor([low, high]), persistent=False)
        self.register_buffer("pair", torch.zeros(2))  # EMA of the (low, high) percentiles
        self.register_buffer("pending", torch.zeros(2), persistent=False)

    def update(self, returns: Tensor) -> Tensor:
        """Divisor [] of advantages after seeing `returns` [...] of every rank."""
        seen = torch.quantile(gather_over_ranks(returns.detach().float().flatten()), self.quantiles)
        self.pending = torch.lerp(self.pair, seen, self.rate)
        return (self.pending[1] - self.pending[0]).clamp_min(self.floor)

    def accept(self, applied: Tensor) -> None:
        """Keep the newest update, or, when applied [] is False, forget it."""
        self.pair.copy_(torch.where(applied, self.pending, self.pair))
