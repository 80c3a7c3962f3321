"""Recurrent state-space model: block GRU, categorical posterior with and prior without the observation.

Source: arXiv 2301.04104, "World model learning" and "Block GRU"; numbers of the current official code, which
has one hidden layer in the recurrent step and one in the posterior at every size. Everything that does not
depend on the recurrent state (observation and action projections) is computed for all time steps at once,
outside the loop; this is exact, only cheaper. The gradient of the loop is written out in `learner.nn.bptt`.

Letters: B batch, T time, D deter size, S categorical variables, C classes, U hidden units, G blocks,
d = D / G, A action width, E token width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.nn.bptt import CoreWeights, PosteriorWeights, core_step, posterior_rollout, posterior_step
from learner.nn.categorical import mixed_probs, sample_one_hot
from learner.nn.imagine import DynamicsWeights, Head, mlp_layers
from learner.nn.layers import MLP, BlockLinear, Linear, NormSilu

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RSSMSizes:
    """Sizes of one RSSM; a row of the model size table."""

    deter: int
    hidden: int
    stoch: int
    classes: int
    blocks: int
    unimix: float
    prior_layers: int

    @property
    def flat_stoch(self) -> int:
        return self.stoch * self.classes

    @property
    def feat(self) -> int:
        return self.deter + self.flat_stoch


class Driver(NamedTuple):
    """What turns an action into its part of the recurrent step."""

    weight: Tensor  # [D, U]
    bias: Tensor  # [D]


class Core(nn.Module):
    """The deterministic step: (deter, stoch, action) -> deter."""

    def __init__(self, sizes: RSSMSizes, action: int) -> None:
        super().__init__()
        deter, hidden, self.blocks = sizes.deter, sizes.hidden, sizes.blocks
        self.deter_in, self.deter_norm = Linear(deter, hidden), NormSilu(hidden)
        self.stoch_in, self.stoch_norm = Linear(sizes.flat_stoch, hidden), NormSilu(hidden)
        self.action_in = MLP(action, hidden, 1)
        self.hidden = BlockLinear(deter + self.blocks * 3 * hidden, deter, self.blocks)
        self.norm = NormSilu(deter)
        self.gates = BlockLinear(deter, 3 * deter, self.blocks)

    def weights(self) -> tuple[CoreWeights, Driver]:
        """The weights as the loop wants them.

        The hidden layer's blocks read their own part of deter and, all alike, the three embedded inputs: what
        they read alike is one dense matrix, and the action's part of it leaves the loop.
        """
        weight = self.hidden.weight  # [G, d + 3U, d]
        own = weight.shape[1] - 3 * self.deter_in.weight.shape[0]
        shared = weight[:, own:].permute(1, 0, 2).flatten(1)  # [3U, D]
        units = shared.shape[0] // 3
        core = CoreWeights(
            deter_in=self.deter_in.weight,
            deter_bias=self.deter_in.bias,
            stoch_in=self.stoch_in.weight,
            stoch_bias=self.stoch_in.bias,
            in_scale=torch.stack([self.deter_norm.scale, self.stoch_norm.scale]),
            own=weight[:, :own],
            shared=shared[: 2 * units],
            scale=self.norm.scale,
            gates=self.gates.weight,
            gates_bias=self.gates.bias.view(self.blocks, 1, -1),
        )
        return core, Driver(shared[2 * units :].t(), self.hidden.bias)

    def drive(self, action: Tensor, driver: Driver) -> Tensor:
        """What action [..., A] and the bias add to the hidden layer: [..., D].

        Entries beyond 1 in magnitude are scaled back to +-1.
        """
        embedded = self.action_in(action / action.detach().abs().clamp_min(1.0))  # [..., U]
        return F.linear(embedded, driver.weight, driver.bias)


class Posterior(nn.Module):
    """q(stoch | deter, tokens)."""

    def __init__(self, sizes: RSSMSizes, tokens: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.linear = Linear(sizes.deter + tokens, sizes.hidden)
        self.norm = NormSilu(sizes.hidden)
        self.logits = Linear(sizes.hidden, sizes.flat_stoch)

    def weights(self) -> PosteriorWeights:
        return PosteriorWeights(
            deter_in=self.linear.weight[:, : self.sizes.deter],
            scale=self.norm.scale,
            logits=self.logits.weight,
            logits_bias=self.logits.bias,
        )

    def project(self, tokens: Tensor) -> Tensor:
        """The part of the first layer that reads tokens [..., E], with its bias: [..., U]."""
        return F.linear(tokens, self.linear.weight[:, self.sizes.deter :], self.linear.bias)


class Prior(nn.Module):
    """p(stoch | deter)."""

    def __init__(self, sizes: RSSMSizes) -> None:
        super().__init__()
        self.shape = (sizes.classes, sizes.stoch)
        self.unimix = sizes.unimix
        self.mlp = MLP(sizes.deter, sizes.hidden, sizes.prior_layers)
        self.logits = Linear(sizes.hidden, sizes.flat_stoch)

    def probs(self, deter: Tensor) -> Tensor:
        """Mixed probabilities [..., C, S] for deter [..., D]."""
        return mixed_probs(self.logits(self.mlp(deter)).unflatten(-1, self.shape), self.unimix)


class RSSM(nn.Module):
    """Core and posterior, plus the prior unless `acting`: actors never predict without an observation."""

    def __init__(self, sizes: RSSMSizes, action: int, tokens: int, *, acting: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.rollout: Callable[..., tuple[Tensor, Tensor, Tensor]] = posterior_rollout
        self.core = Core(sizes, action)
        self.posterior = Posterior(sizes, tokens)
        if not acting:
            self.prior = Prior(sizes)

    def initial(self, batch: int) -> State:
        """The all-zero state: deter [B, D], stoch [B, C, S]."""
        device = self.core.norm.scale.device
        return {
            "deter": torch.zeros(batch, self.sizes.deter, device=device),
            "stoch": torch.zeros(batch, self.sizes.classes, self.sizes.stoch, device=device),
        }

    def observe(
        self, carry: State, tokens: Tensor, prev_action: Tensor, is_first: Tensor, uniform: Tensor
    ) -> tuple[State, State]:
        """Filter T rows: (carry after the last row, states of all rows with the posterior "probs").

        Shapes: carry deter [B, D], stoch [B, C, S]; tokens [B, T, E]; prev_action [B, T, A];
        is_first [B, T] bool; uniform [B, T, S]; states [B, T, ...].
        is_first rows forget the carry and the previous action.
        """
        keep = (~is_first).t().unsqueeze(-1).float()  # [T, B, 1]
        core, driver = self.core.weights()
        deter, probs, stoch = self.rollout(
            carry["deter"],
            carry["stoch"].flatten(1),
            self.core.drive(prev_action.transpose(0, 1) * keep, driver),
            self.posterior.project(tokens.transpose(0, 1)),
            keep,
            uniform.transpose(0, 1),
            core,
            self.posterior.weights(),
            self.sizes.unimix,
        )
        states = {
            "deter": deter.transpose(0, 1),
            "stoch": stoch.transpose(0, 1),
            "probs": probs.transpose(0, 1),
        }
        return {"deter": deter[-1], "stoch": stoch[-1]}, states

    def filter(
        self,
        deter: Tensor,
        stoch: Tensor,
        drive: Tensor,
        projected: Tensor,
        uniform: Tensor,
        core: CoreWeights,
        posterior: PosteriorWeights,
    ) -> tuple[Tensor, Tensor]:
        """One observed row without gradients, for acting: (deter [B, D], stoch [B, C, S])."""
        deter = core_step(deter, stoch, drive, core).deter
        soft = posterior_step(deter, projected, posterior, self.sizes.stoch).soft
        return deter, sample_one_hot(soft, uniform, self.sizes.unimix)

    def dynamics(self) -> DynamicsWeights:
        """Core and prior as the region of imagination reads them."""
        core, driver = self.core.weights()
        (action,) = mlp_layers(self.core.action_in)
        logits = self.prior.logits
        prior = Head(mlp_layers(self.prior.mlp), logits.weight, logits.bias)
        return DynamicsWeights(core, action, driver.weight, driver.bias, prior, self.sizes.unimix)

    def step(self, state: State, action: Tensor, uniform: Tensor) -> State:
        """One imagined transition; action [N, A], uniform [N, S]."""
        core, driver = self.core.weights()
        return self.predict(state, self.core.drive(action, driver), uniform, core)

    def predict(self, state: State, drive: Tensor, uniform: Tensor, core: CoreWeights) -> State:
        """`step` with the loop-invariant parts given."""
        deter = core_step(state["deter"], state["stoch"].flatten(1), drive, core).deter
        return {"deter": deter, "stoch": sample_one_hot(self.prior.probs(deter), uniform)}


def features(state: State) -> Tensor:
    """What every head reads: deter and flattened stoch, [..., D + C*S]."""
    return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)
