"""The DreamerV3 policy on actors: encoder, posterior and actor only, on the CPU, without gradients.

Implements system.interfaces.Policy. Knows no decoder, critic or prior. Letters: N envs of one actor,
n rows of one step, D deter, S variables, C classes, A action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.families.dreamer.behavior import make_actor
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.latents import latent_columns
from learner.families.dreamer.world_model import make_encoder, rssm_sizes
from learner.nn.codec import pack_float, pack_one_hot
from learner.nn.heads import decode_action
from learner.nn.layers import initialise
from learner.nn.optim import check_arrays
from learner.nn.rssm import RSSM
from system.experience import Step
from system.interfaces import Mode
from system.seeds import child_seed
from system.specs import ArraySpec, EnvSpec
from system.weights import NO_VERSION, PolicyVersion, Weights


@dataclass(slots=True, kw_only=True)
class PolicyCarry:
    """State of every environment, updated in place by `DreamerPolicy.act`."""

    deter: Tensor  # [N, D]
    stoch: Tensor  # [N, S * C]
    action: Tensor  # [N, A]


class DreamerPolicy:
    """Acts with whatever weights were loaded last; before the first load, with its own random ones.

    mode "train" samples from the policy. mode "eval" takes its mode (the most probable class, the mean):
    the official curves are training returns, which sample, so compare like with like.
    """

    def __init__(self, config: DreamerConfig, env: EnvSpec, *, seed: int) -> None:
        self.env = env
        self.columns: Mapping[str, ArraySpec] = latent_columns(config)
        self.version: PolicyVersion = NO_VERSION
        sizes = rssm_sizes(config)
        encoder = make_encoder(config, env)
        self.rssm = RSSM(sizes, env.action.width, encoder.outputs, acting=True)
        self.actor = make_actor(config, sizes.feat, env.action)
        self.encoder = encoder
        self.module = nn.ModuleDict({"encoder": encoder, "rssm": self.rssm, "actor": self.actor})
        initialise(self.module, torch.Generator().manual_seed(child_seed(seed, "weights")))
        self.module.requires_grad_(requires_grad=False)
        self.generator = torch.Generator().manual_seed(child_seed(seed, "noise"))
        self._weights = (*self.rssm.core.weights(), self.rssm.posterior.weights())

    def initial(self, num_envs: int) -> PolicyCarry:
        sizes = self.rssm.sizes
        return PolicyCarry(
            deter=torch.zeros(num_envs, sizes.deter),
            stoch=torch.zeros(num_envs, sizes.flat_stoch),
            action=torch.zeros(num_envs, self.env.action.width),
        )

    @torch.inference_mode()
    def act(
        self, carry: PolicyCarry, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], PolicyCarry, dict[str, NDArray[np.generic]]]:
        """(action [n, *shape], the same carry updated, latent columns [n, ...]).

        is_first rows forget state and previous action; the action of an is_last row is zero.
        """
        rows = torch.from_numpy(step.env_id.astype(np.int64))
        keep = torch.from_numpy(~step.is_first).float().unsqueeze(-1)  # [n, 1]
        obs = {k: torch.from_numpy(np.ascontiguousarray(step.obs[k])) for k in self.env.obs}
        core, driver, posterior = self._weights
        uniform = torch.rand((len(step), self.rssm.sizes.stoch), generator=self.generator)
        deter, sample = self.rssm.filter(
            carry.deter[rows] * keep,
            carry.stoch[rows] * keep,
            self.rssm.core.drive(carry.action[rows] * keep, driver),
            self.rssm.posterior.project(self.encoder(obs)),
            uniform,
            core,
            posterior,
        )
        stoch = sample.flatten(1)
        raw = self.actor(torch.cat([deter, stoch], -1))
        if mode == "train":
            action = self.actor.sample(raw, self.actor.noise((len(step),), self.generator))
        else:
            action = self.actor.mode(raw)
        carry.deter[rows], carry.stoch[rows], carry.action[rows] = deter, stoch, action
        out = decode_action(action, self.env.action).numpy()
        out[step.is_last] = 0
        extras: dict[str, NDArray[np.generic]] = {
            "deter": pack_float(deter),
            "stoch": pack_one_hot(sample),
        }
        return out, carry, extras

    def load(self, weights: Weights) -> None:
        """Take new weights and their version. Raises: SchemaError when they belong to another model."""
        named = dict(self.module.named_parameters())
        check_arrays({k: tuple(p.shape) for k, p in named.items()}, weights.arrays, "policy weights")
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(np.array(weights.arrays[name], np.float32)))
        self._weights = (*self.rssm.core.weights(), self.rssm.posterior.weights())
        self.version = weights.version
