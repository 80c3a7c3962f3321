"""One acting step of a policy on an RSSM, without gradients: filter one observed row, choose the action.

Made of the modules as they stand: it is the program that `learner.program` writes, and the oracle of
`learner.nn.fast_acting`, which does the same in few calls.

Letters: n rows, D deter, S variables, C classes, Z = C*S, A action width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learner.nn.encoder import Encoder
from learner.nn.heads import BoundedNormalHead, DiscreteActionHead
from learner.nn.rssm import RSSM


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
