"""One whole DreamerV3 update as a function of tensors: rows and random numbers in, metrics and latents out.

In here nothing waits for the device, looks at a value or draws a number, and all state is tensors changed in
place: the same launches make up every update of one shape, so `learner.capture` can record them. Called by
the agent, which owns the generator and talks to the host. Letters: B batch, T trained rows, C context rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.distributed import average_, own_rows, rank_count
from learner.families.dreamer.behavior import ActorCritic
from learner.families.dreamer.world_model import DreamerWorldModel
from learner.health.signals import input_signals, module_regions, region_norms
from learner.interfaces import Tree
from learner.nn.categorical import one_hot
from learner.nn.codec import class_index
from learner.nn.heads import encode_action
from learner.nn.optim import FlatParameters, LaProp
from system.errors import SchemaError
from system.experience import Sequence
from system.specs import EnvSpec

FLAGS = ("is_first", "is_last", "is_terminal")
LEAST_ROWS = 2
MODEL_NOISE, BEHAVIOR_NOISE = "noise/model/", "noise/behavior/"


class Losses(NamedTuple):
    """Both parts of one loss evaluation together."""

    total: Tensor  # [], differentiable
    metrics: dict[str, Tensor]  # each []
    rows: Tree  # deter [B, T, D], stoch [B, T, C, S], perhaps error [B, K]


def row_priority(error: Tensor, time: int) -> Tensor:
    """Errors [B, K] of the last K rows as priorities [B, T], float32: rows before them get the mean."""
    error = error.float().clamp(min=0.0)
    missing = time - error.shape[1]
    return torch.cat([error.mean(1, keepdim=True).expand(-1, missing), error], 1) if missing else error


class DreamerUpdate:
    """World model, actor and critic losses, their gradients, the optimiser, slow critic and return range."""

    def __init__(
        self,
        model: DreamerWorldModel,
        behavior: ActorCritic,
        parameters: FlatParameters,
        optimiser: LaProp,
        env: EnvSpec,
        *,
        bf16: bool,
    ) -> None:
        self.model, self.behavior, self.env = model, behavior, env
        self.parameters, self.optimiser = parameters, optimiser
        self.bf16 = bf16
        self.regions = module_regions(parameters.names, parameters.sizes)
        self.names: tuple[str, ...] = ()
        """What the entries of the output "metrics" are, known after the first update."""

    def arrays(self, sequence: Sequence) -> dict[str, NDArray[np.generic]]:
        """What of a sequence goes to the device. Raises: SchemaError when no row is left to train on."""
        columns, context = sequence.columns, sequence.context
        rows = sequence.shape[1]
        if rows <= context:
            raise SchemaError(
                f"sequence of {rows} rows with {context} context rows leaves nothing to train on; "
                "raise the batch length"
            )
        out = {name: columns[name] for name in ("reward", "action", *FLAGS)}
        out |= {f"obs/{key}": columns[key] for key in self.env.obs}
        if context:
            out |= {name: columns[name][:, context - 1] for name in ("deter", "stoch")}
        if sequence.weights is not None:
            out["weight"] = sequence.weights
        return out

    def noise(self, batch: int, time: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers of one update on `batch` sequences of `time` rows, sequences first.

        All ranks draw alike for the whole batch and keep what belongs to their own sequences.
        """
        batch *= rank_count()
        model = self.model.noise(batch, time, generator)
        behavior = self.behavior.noise(batch, time, generator)
        starts = behavior["action"].shape[0]
        behavior |= self.model.noise(starts, self.behavior.horizon, generator)
        out = {MODEL_NOISE + name: own_rows(x) for name, x in model.items()}
        return out | {BEHAVIOR_NOISE + name: own_rows(x) for name, x in behavior.items()}

    def unpack(self, inputs: dict[str, Tensor], context: int) -> tuple[Tree, Tree]:
        """(trained rows [B, T, ...], state before them [B, ...]) of what `arrays` chose."""
        trained: Tree = {name: inputs[name][:, context:] for name in ("reward", *FLAGS)}
        # An episode that its actor abandoned has no last row: what precedes a first row was one, or returns
        # would run on into the next episode.
        last = trained["is_last"].clone()
        last[:, :-1] |= trained["is_first"][:, 1:]
        action = encode_action(inputs["action"], self.env.action)  # [B, C + T, A]
        before = (
            action[:, context - 1 : -1]
            if context
            else torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
        )
        batch: Tree = trained | {
            "is_last": last,
            "obs": {key: inputs[f"obs/{key}"][:, context:] for key in self.env.obs},
            "prev_action": before,
        }
        if "weight" in inputs:
            batch["weight"] = inputs["weight"]
        if not context:
            return batch, self.model.initial(action.shape[0])
        classes = self.model.rssm.sizes.classes
        start = {
            "deter": inputs["deter"].view(torch.bfloat16).float(),
            "stoch": one_hot(inputs["stoch"].clamp_max(classes - 1).long(), classes),
        }
        return batch, start

    def losses(self, inputs: dict[str, Tensor], context: int) -> Losses:
        """Forward part. Raises: SchemaError when no row is replayed that a later one gives a return."""
        batch, start = self.unpack(inputs, context)
        if (rows := batch["reward"].shape[1]) < LEAST_ROWS:
            raise SchemaError(
                f"sequence has {rows} row to train on, must have {LEAST_ROWS} at least; raise batch length"
            )
        noises = (
            {name.removeprefix(of): x for name, x in inputs.items() if name.startswith(of)}
            for of in (MODEL_NOISE, BEHAVIOR_NOISE)
        )
        model_noise, behavior_noise = noises
        with torch.autocast(batch["reward"].device.type, torch.bfloat16, enabled=self.bf16):
            model = self.model.loss(batch, start, model_noise)
            behavior = self.behavior.loss(self.model, batch, model.states, behavior_noise)
        metrics = model.metrics | behavior.metrics | input_signals(batch, start)
        return Losses(model.total + behavior.total, metrics, model.rows | behavior.rows)

    def __call__(self, inputs: dict[str, Tensor], context: int, steps: int = 0) -> dict[str, Tensor]:
        """Apply one update; return metrics [M], deter [B, T, D] bfloat16, stoch [B, T, S] and maybe priority.

        `steps` counts the compiled steps taken up: only a recording has to tell them apart.
        An update whose loss or gradient is not finite leaves every state as it was.
        """
        del steps
        total, metrics, rows = self.losses(inputs, context)
        self.parameters.grads.zero_()
        total.backward()
        with torch.no_grad():
            average_(self.parameters.grads)
            loss = average_(total.detach().clone())
            metrics |= region_norms(self.parameters.grads, self.regions, "grad_norm/")
            metrics["loss/total"] = loss
            # The last word to other ranks: one that is lost leaves either a whole update here or none.
            shared = average_(torch.stack([value.float() for value in metrics.values()]))
            applied = self.optimiser.step(loss)
            self.behavior.after_step(applied.finite)
            self.model.after_step(applied.finite)
            after = {
                "grad_norm": applied.grad_norm,
                "nonfinite": (~applied.finite).float(),
                "lr": applied.rate,
            }
            self.names = (*metrics, *after)
            out = {
                "metrics": torch.cat([shared, torch.stack([value.float() for value in after.values()])]),
                "deter": rows["deter"].to(torch.bfloat16),
                "stoch": class_index(rows["stoch"]),
            }
            if "error" in rows:
                out["priority"] = row_priority(rows["error"], rows["deter"].shape[1])
        return out
