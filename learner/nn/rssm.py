"""Recurrent state-space model: block GRU, categorical posterior from the observation, categorical prior without.

Source: arXiv 2301.04104, "World model learning" and "Block GRU"; numbers of the current official code.
Everything that does not depend on the recurrent state (observation and action projections) is computed for
all time steps at once, outside the loop; this is exact, only cheaper.

Letters: B batch, T time, D deter size, S categorical variables, C classes, U hidden units, G blocks,
A action width, E token width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.nn.categorical import mixed_probs, sample_one_hot
from learner.nn.layers import MLP, BlockLinear, Linear, Norm

UPDATE_BIAS = -1.0  # the update gate starts mostly closed: memory by default
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
    posterior_layers: int
    dynamics_layers: int

    @property
    def feat(self) -> int:
        return self.deter + self.stoch * self.classes


class Core(nn.Module):
    """The deterministic step: (deter, stoch, action) -> deter."""

    def __init__(self, sizes: RSSMSizes, action: int) -> None:
        super().__init__()
        deter, hidden, blocks = sizes.deter, sizes.hidden, sizes.blocks
        self.blocks = blocks
        self.from_deter = MLP(deter, hidden, 1)
        self.from_stoch = MLP(sizes.stoch * sizes.classes, hidden, 1)
        self.from_action = MLP(action, hidden, 1)
        widths = [deter + blocks * 3 * hidden] + [deter] * sizes.dynamics_layers
        self.hidden = nn.ModuleList(
            [BlockLinear(a, b, blocks) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.norm = nn.ModuleList([Norm(deter) for _ in range(sizes.dynamics_layers)])
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def embed_action(self, action: Tensor) -> Tensor:
        """Action [..., A] -> [..., U]; entries beyond 1 in magnitude are scaled back to +-1."""
        return self.from_action(action / action.detach().abs().clamp_min(1.0))

    def split(self) -> tuple[Tensor, Tensor]:
        """First hidden layer, cut by what it reads: own block of deter [G, D/G, O], inputs [3U, G*O].

        Every block sees the same three embedded inputs, so their part is one dense matrix.
        """
        weight = self.hidden[0].weight  # [G, D/G + 3U, O]
        own = self.gates.weight.shape[1]
        shared = weight[:, own:].permute(1, 0, 2)  # [3U, G, O]
        return weight[:, :own], shared.reshape(shared.shape[0], -1)

    def drive(self, action: Tensor, shared: Tensor) -> Tensor:
        """What the action and the bias add to the first hidden layer: action [..., A] -> [..., D]."""
        embedded = self.embed_action(action)  # [..., U]
        part = shared[-embedded.shape[-1] :].t()  # [D, U]
        return F.linear(embedded, part, self.hidden[0].bias)

    def step(self, deter: Tensor, stoch: Tensor, drive: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """deter [B, D], stoch [B, S*C], drive [B, D] -> deter [B, D]; weights from `split`."""
        inputs = torch.cat([self.from_deter(deter), self.from_stoch(stoch)], -1)  # [B, 2U]
        x = drive + inputs @ shared[: inputs.shape[-1]]
        blocked = deter.view(deter.shape[0], self.blocks, -1).transpose(0, 1)  # [G, B, D/G]
        x = x + torch.bmm(blocked, own).transpose(0, 1).reshape(x.shape)  # [B, D]
        x = F.silu(self.norm[0](x))
        for layer, norm in zip(self.hidden[1:], self.norm[1:], strict=True):
            x = F.silu(norm(layer(x)))
        gates = self.gates(x).view(deter.shape[0], self.blocks, 3, -1).float()  # [B, G, 3, D/G]
        reset, candidate, update = gates.unbind(2)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate).flatten(1)  # [B, D]
        update = torch.sigmoid(update + UPDATE_BIAS).flatten(1)
        return torch.lerp(deter, candidate, update)


class Posterior(nn.Module):
    """q(stoch | deter, tokens)."""

    def __init__(self, sizes: RSSMSizes, tokens: int) -> None:
        super().__init__()
        self.shape = (sizes.stoch, sizes.classes)
        self.unimix = sizes.unimix
        widths = [sizes.deter + tokens] + [sizes.hidden] * sizes.posterior_layers
        self.linear = nn.ModuleList([Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])
        self.norm = nn.ModuleList([Norm(sizes.hidden) for _ in range(sizes.posterior_layers)])
        self.logits = Linear(sizes.hidden, sizes.stoch * sizes.classes)

    def project(self, tokens: Tensor) -> Tensor:
        """The part of the first layer that reads tokens, with its bias: [..., E] -> [..., U]."""
        first = self.linear[0]
        return F.linear(tokens, first.weight[:, -tokens.shape[-1] :], first.bias)

    def probs(self, deter: Tensor, projected: Tensor) -> Tensor:
        """deter [B, D], projected [B, U] -> mixed probabilities [B, S, C]."""
        x = projected + F.linear(deter, self.linear[0].weight[:, : deter.shape[-1]])
        x = F.silu(self.norm[0](x))
        for linear, norm in zip(self.linear[1:], self.norm[1:], strict=True):
            x = F.silu(norm(linear(x)))
        return mixed_probs(self.logits(x).view(*deter.shape[:-1], *self.shape), self.unimix)


class Prior(nn.Module):
    """p(stoch | deter)."""

    def __init__(self, sizes: RSSMSizes) -> None:
        super().__init__()
        self.shape = (sizes.stoch, sizes.classes)
        self.unimix = sizes.unimix
        self.mlp = MLP(sizes.deter, sizes.hidden, sizes.prior_layers)
        self.logits = Linear(sizes.hidden, sizes.stoch * sizes.classes)

    def probs(self, deter: Tensor) -> Tensor:
        """deter [..., D] -> mixed probabilities [..., S, C]."""
        return mixed_probs(self.logits(self.mlp(deter)).unflatten(-1, self.shape), self.unimix)


class RSSM(nn.Module):
    """Core and posterior, plus the prior unless `acting` (actors never predict without an observation)."""

    def __init__(self, sizes: RSSMSizes, action: int, tokens: int, *, acting: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.core = Core(sizes, action)
        self.posterior = Posterior(sizes, tokens)
        if not acting:
            self.prior = Prior(sizes)

    def initial(self, batch: int) -> State:
        """The all-zero state: deter [B, D], stoch [B, S, C]."""
        device = self.posterior.logits.bias.device
        return {
            "deter": torch.zeros(batch, self.sizes.deter, device=device),
            "stoch": torch.zeros(batch, self.sizes.stoch, self.sizes.classes, device=device),
        }

    def observe(
        self, carry: State, tokens: Tensor, prev_action: Tensor, is_first: Tensor, uniform: Tensor
    ) -> tuple[State, State]:
        """Filter T rows: (carry after the last row, states of all rows with the posterior "probs").

        Shapes: carry deter [B, D], stoch [B, S, C]; tokens [B, T, E]; prev_action [B, T, A];
        is_first [B, T] bool; uniform [B, T, S]; states [B, T, ...].
        is_first rows forget the carry and the previous action.
        """
        keep = (~is_first).unsqueeze(-1).float()  # [B, T, 1]
        own, shared = self.core.split()
        drive = self.core.drive(prev_action * keep, shared).unbind(1)
        projected = self.posterior.project(tokens).unbind(1)
        keeps, uniforms = keep.unbind(1), uniform.unbind(1)
        deter, stoch = carry["deter"], carry["stoch"].flatten(1)
        deters: list[Tensor] = []
        stochs: list[Tensor] = []
        probs: list[Tensor] = []
        for t in range(is_first.shape[1]):
            deter, prob, sample = self.observe_step(
                deter * keeps[t], stoch * keeps[t], drive[t], projected[t], uniforms[t], own, shared
            )
            stoch = sample.flatten(1)
            deters.append(deter)
            stochs.append(sample)
            probs.append(prob)
        states = {
            "deter": torch.stack(deters, 1),
            "stoch": torch.stack(stochs, 1),
            "probs": torch.stack(probs, 1),
        }
        return {"deter": deter, "stoch": stochs[-1]}, states

    def observe_step(
        self,
        deter: Tensor,
        stoch: Tensor,
        drive: Tensor,
        projected: Tensor,
        uniform: Tensor,
        own: Tensor,
        shared: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One filtered row: (deter [B, D], probs [B, S, C], sample [B, S, C]).

        deter [B, D] and stoch [B, S*C] are already reset where an episode begins.
        """
        deter = self.core.step(deter, stoch, drive, own, shared)
        probs = self.posterior.probs(deter, projected)
        return deter, probs, sample_one_hot(probs, uniform)

    def step(self, state: State, action: Tensor, uniform: Tensor) -> State:
        """One imagined transition; action [N, A], uniform [N, S]."""
        own, shared = self.core.split()
        return self.imagine_step(state, self.core.drive(action, shared), uniform, own, shared)

    def imagine_step(
        self, state: State, drive: Tensor, uniform: Tensor, own: Tensor, shared: Tensor
    ) -> State:
        """`step` with the loop-invariant parts given."""
        deter = self.core.step(state["deter"], state["stoch"].flatten(1), drive, own, shared)
        return {"deter": deter, "stoch": sample_one_hot(self.prior.probs(deter), uniform)}


def features(state: State) -> Tensor:
    """What every head reads: deter and flattened stoch, [..., D + S*C]."""
    return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)
