"""One acting step of a policy on an RSSM, without gradients: filter one observed row, choose the action.

Made of the modules as they stand: it is the program that `learner.program` writes, and the oracle of
`learner.nn.fast_acting`, which does the same in few calls.

Letters: n rows, D deter, S variables, C classes, Z = C*S, A action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learner.nn.encoder import Encoder
from learner.nn.heads import BoundedNormalHead, DiscreteActionHead
from learner.nn.rssm import RSSM
from system.specs import ArraySpec


class PlainStep(nn.Module):
    """Encoder, core and posterior of the RSSM, actor: what an acting policy consists of."""

    def __init__(
        self, encoder: Encoder, rssm: RSSM, actor: DiscreteActionHead | BoundedNormalHead, action: int
    ) -> None:
        """`action`: width of an action as the model reads it, A."""
        super().__init__()
        self.encoder, self.rssm, self.actor = encoder, rssm, actor
        self.action_width = action

    def forward(
        self,
        deter: Tensor,
        stoch: Tensor,
        action: Tensor,
        obs: Mapping[str, Tensor],
        is_first: Tensor,
        uniform: Tensor,
        noise: Tensor,
        greedy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(action [n, A] as models read it, deter [n, D], stoch [n, C, S]).

        Shapes: deter [n, D], stoch [n, Z] and the previous action [n, A], which is_first [n] rows forget; obs
        values [n, ...]; uniform [n, S]; noise [n, *] as `actor.noise` draws it; greedy [n] rows take the
        mode.
        """
        rssm = self.rssm
        keep = (~is_first).float().unsqueeze(-1)  # [n, 1]
        core, driver = rssm.core.weights()
        deter, sample = rssm.filter(
            deter * keep,
            stoch * keep,
            rssm.core.drive(action * keep, driver),
            rssm.posterior.project(self.encoder(obs)),
            uniform,
            core,
            rssm.posterior.weights(),
        )
        raw = self.actor(torch.cat([deter, sample.flatten(1)], -1))
        chosen = torch.where(greedy.unsqueeze(-1), self.actor.mode(raw), self.actor.sample(raw, noise))
        return chosen, deter, sample

    def example(self, obs: Mapping[str, ArraySpec], rows: int) -> dict[str, Any]:
        """Inputs of one step of `rows` rows by name: made-up state and observations, true random numbers."""
        sizes = self.rssm.sizes
        generator = torch.Generator().manual_seed(rows)
        return {
            "deter": torch.rand(rows, sizes.deter, generator=generator) - 0.5,
            "stoch": torch.rand(rows, sizes.flat_stoch, generator=generator),
            "action": torch.rand(rows, self.action_width, generator=generator),
            "obs": {key: _made_up(spec, rows, generator) for key, spec in sorted(obs.items())},
            "is_first": torch.arange(rows) % 2 == 1,
            "uniform": torch.rand(rows, sizes.stoch, generator=generator),
            "noise": self.actor.noise((rows,), generator),
            "greedy": torch.arange(rows) % 3 == 1,
        }


def _made_up(spec: ArraySpec, rows: int, generator: torch.Generator) -> Tensor:
    """Values [n, *shape] that an array of this kind may hold."""
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(rows, *spec.shape, generator=generator).to(dtype)
    high = spec.classes if spec.kind == "discrete" else 2 if spec.dtype == "bool" else 100
    return torch.randint(high, (rows, *spec.shape), generator=generator).to(dtype)
