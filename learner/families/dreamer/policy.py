"""The DreamerV3 policy on actors: encoder, posterior and actor only, on the CPU, without gradients.

Implements system.interfaces.Policy. Knows no decoder, critic or prior. Letters: N envs of one actor,
n rows of one step, D deter, S variables, C classes, A action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from learner.families.dreamer.behavior import make_actor
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.latents import latent_columns
from learner.families.dreamer.world_model import make_encoder, rssm_sizes
from learner.nn.acting import PlainStep
from learner.nn.codec import pack_float
from learner.nn.fast_acting import FastStep, Rows
from learner.nn.heads import decode_action
from learner.nn.layers import initialise
from learner.nn.optim import check_arrays
from learner.nn.rssm import RSSM
from system.experience import Step
from system.interfaces import Mode
from system.seeds import child_seed
from system.specs import ArraySpec, EnvSpec
from system.weights import NO_VERSION, PolicyVersion, Weights


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
        self.plain = PlainStep(
            encoder,
            RSSM(sizes, env.action.width, encoder.outputs, acting=True),
            make_actor(config, sizes.feat, env.action),
            env.action.width,
        )
        initialise(self.plain, torch.Generator().manual_seed(child_seed(seed, "weights")))
        self.plain.requires_grad_(requires_grad=False)
        self.generator = torch.Generator().manual_seed(child_seed(seed, "noise"))
        self.fast = FastStep(self.plain)

    def initial(self, num_envs: int) -> Rows:
        return self.fast.rows(num_envs)

    @torch.inference_mode()
    def act(
        self, carry: Rows, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], Rows, dict[str, NDArray[np.generic]]]:
        """(action [n, *shape], the same carry updated, latent columns [n, ...]).

        is_first rows forget state and previous action; the action of an is_last row is zero.
        """
        rows = self.fast.borrow(carry, step.env_id)
        rows.forget(step.is_first)
        self.fast(rows, step.obs, self.generator, greedy=mode == "eval")
        action = decode_action(rows.action, self.env.action).numpy()
        if np.count_nonzero(step.is_last):
            action[step.is_last] = 0
        if rows is not carry:
            rows.give_back()
        return action, carry, {"deter": pack_float(rows.deter), "stoch": rows.stoch_index()}

    def example(self, rows: int) -> dict[str, Any]:
        """Inputs of `plain` for `rows` rows."""
        return self.plain.example(self.env.obs, rows)

    def load(self, weights: Weights) -> None:
        """Take new weights and their version. Raises: SchemaError when they belong to another model."""
        named = dict(self.plain.named_parameters())
        check_arrays({k: tuple(p.shape) for k, p in named.items()}, weights.arrays, "policy weights")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.from_numpy(np.array(weights.arrays[name], np.float32)))
            self.fast.join()
        self.version = weights.version
