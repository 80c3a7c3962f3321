"""The DreamerV3 policy on actors: encoder, posterior and actor only, on the CPU, without gradients.

Implements system.interfaces.Policy. Knows no decoder, critic or prior. Letters: N envs of one actor,
n rows of one step, D deter, S variables, C classes, A action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

SUBSETS = 8
"""Sizes of partial steps whose buffers are kept: environments that answer in batches use one or two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCarry:
    """State of every environment, updated in place by `DreamerPolicy.act`."""

    rows: Rows

    @property
    def deter(self) -> Tensor:
        """[N, D]"""
        return self.rows.deter

    @property
    def stoch(self) -> Tensor:
        """[N, C * S]"""
        return self.rows.stoch

    @property
    def action(self) -> Tensor:
        """[N, A], of the previous row; zeros before the first."""
        return self.rows.action


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
        self._subsets: dict[int, Rows] = {}

    def initial(self, num_envs: int) -> PolicyCarry:
        return PolicyCarry(rows=self.fast.rows(num_envs))

    def act(
        self, carry: PolicyCarry, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], PolicyCarry, dict[str, NDArray[np.generic]]]:
        """(action [n, *shape], the same carry updated, latent columns [n, ...]).

        is_first rows forget state and previous action; the action of an is_last row is zero.
        """
        with torch.inference_mode():
            if step.env_id.tobytes() == carry.rows.ids:
                return self._act(carry.rows, step, mode, carry)
            rows = self._subset(len(step))
            index = torch.from_numpy(step.env_id.astype(np.int64))
            rows.gather(carry.rows, index)
            result = self._act(rows, step, mode, carry)
            rows.scatter(carry.rows, index)
            return result

    def _act(
        self, rows: Rows, step: Step, mode: Mode, carry: PolicyCarry
    ) -> tuple[NDArray[np.generic], PolicyCarry, dict[str, NDArray[np.generic]]]:
        rows.forget(step.is_first)
        self.fast(rows, step.obs, self.generator, greedy=mode == "eval")
        action = decode_action(rows.action, self.env.action).numpy()
        if np.count_nonzero(step.is_last):
            action[step.is_last] = 0
        return action, carry, {"deter": pack_float(rows.deter), "stoch": rows.stoch_index()}

    def _subset(self, count: int) -> Rows:
        """Buffers for a step of `count` rows that are not all environments in order."""
        if count not in self._subsets:
            while len(self._subsets) >= SUBSETS:
                self._subsets.pop(next(iter(self._subsets)))
            self._subsets[count] = self.fast.rows(count)
        return self._subsets[count]

    def example(self, rows: int) -> dict[str, Any]:
        """Inputs of `plain` for `rows` rows: made-up observations and state, true random numbers."""
        sizes = self.plain.rssm.sizes
        generator = torch.Generator().manual_seed(rows)
        return {
            "deter": torch.rand(rows, sizes.deter, generator=generator) - 0.5,
            "stoch": torch.rand(rows, sizes.flat_stoch, generator=generator),
            "action": torch.rand(rows, self.env.action.width, generator=generator),
            "obs": {key: _made_up(spec, rows, generator) for key, spec in sorted(self.env.obs.items())},
            "is_first": torch.arange(rows) % 2 == 1,
            "uniform": torch.rand(rows, sizes.stoch, generator=generator),
            "noise": self.plain.actor.noise((rows,), generator),
            "greedy": torch.arange(rows) % 3 == 1,
        }

    def load(self, weights: Weights) -> None:
        """Take new weights and their version. Raises: SchemaError when they belong to another model."""
        named = dict(self.plain.named_parameters())
        check_arrays({k: tuple(p.shape) for k, p in named.items()}, weights.arrays, "policy weights")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.from_numpy(np.array(weights.arrays[name], np.float32)))
            self.fast.join()
        self.version = weights.version


def _made_up(spec: ArraySpec, rows: int, generator: torch.Generator) -> Tensor:
    """Values [n, *shape] that an array of this kind may hold."""
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(rows, *spec.shape, generator=generator).to(dtype)
    high = spec.classes if spec.kind == "discrete" else 2 if spec.dtype == "bool" else 100
    return torch.randint(high, (rows, *spec.shape), generator=generator).to(dtype)
