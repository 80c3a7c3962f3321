"""The DreamerV3 agent: one update of world model, actor and critic per call, under one optimiser.

Implements system.interfaces.Agent. Between `learner.loop`, which brings sequences, and the family's model and
behavior, which bring losses. Letters: B batch, T trained rows, C context rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.distributed import mean_over_ranks
from learner.families.dreamer.behavior import ActorCritic
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.latents import latent_columns
from learner.families.dreamer.world_model import DreamerWorldModel
from learner.interfaces import Stage, Tree, check_needs
from learner.nn.codec import pack_float, pack_one_hot, unpack_float, unpack_one_hot
from learner.nn.heads import encode_action
from learner.nn.layers import initialise
from learner.nn.optim import FlatParameters, LaProp, check_arrays
from replay.batch_spec import BatchSpec
from system.errors import SchemaError
from system.experience import Sequence, WriteBack
from system.seeds import child_seed
from system.specs import EnvSpec

PrioritySignal = Literal["none", "model", "value"]


def row_priority(error: Tensor, time: int) -> Tensor:
    """Errors [B, K] of the last K rows as priorities [B, T], float32: rows before them get the mean."""
    error = error.float().clamp(min=0.0)
    missing = time - error.shape[1]
    return torch.cat([error.mean(1, keepdim=True).expand(-1, missing), error], 1) if missing else error


class DreamerAgent:
    """Owns the parameters, the optimiser and the random generator of a DreamerV3 learner."""

    def __init__(
        self,
        config: DreamerConfig,
        env: EnvSpec,
        *,
        device: torch.device,
        seed: int,
        priority_signal: PrioritySignal = "none",
    ) -> None:
        """`priority_signal`: the error of each row that is written back as its priority, if any."""
        self.env, self.device = env, device
        self.columns = latent_columns(config)
        self.classes = config.classes
        self.bf16 = config.dtype == "bf16"
        self.model = DreamerWorldModel(config, env)
        self.behavior = ActorCritic(config, self.model.feat_size, env.action)
        check_needs("actor-critic", self.behavior.needs, "dreamer", self.model.caps)
        self.model.row_error = priority_signal == "model"
        self.behavior.row_error = priority_signal == "value"
        self.module = nn.ModuleDict({"model": self.model, "behavior": self.behavior})
        initialise(self.module, torch.Generator().manual_seed(child_seed(seed, "weights")))
        self.behavior.slow.load_state_dict(self.behavior.critic.state_dict())
        self.module.to(device)
        self.parameters = FlatParameters(self.module, device)
        self.optimiser = LaProp(
            self.parameters,
            lr=config.lr,
            warmup=config.warmup,
            agc=config.agc,
            agc_floor=config.agc_floor,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
        )
        self.generator = torch.Generator(device).manual_seed(child_seed(seed, "noise"))

    def stages(self, batch: int, length: int) -> tuple[Stage, ...]:
        """DreamerV3 is one stage that never ends."""
        spec = BatchSpec(batch=batch, length=length, context=1)
        return (Stage(name="dreamer", train=("model", "behavior"), spec=spec, until=0),)

    def parameter_count(self) -> int:
        """Trainable parameters; the slow critic is not one of them."""
        return self.parameters.count

    def initial(self, batch: int) -> Tree:
        """Nothing is carried from batch to batch: the state comes from the replay context."""
        del batch
        return {}

    def learn(self, sequence: Sequence, carry: Tree) -> tuple[Tree, dict[str, float], WriteBack | None]:
        """One update. A loss or gradient that is not finite changes nothing and is counted in `nonfinite`.

        Metrics: loss/<part>, entropy/<of>, imagined/<what>, grad_norm, lr, nonfinite (0 or 1).
        """
        batch, start = self.prepare(sequence)
        total, metrics, rows = self._losses(batch, start)
        self.parameters.grads.zero_()
        total.backward()
        self.parameters.grads.copy_(mean_over_ranks(self.parameters.grads))
        metrics["loss/total"] = mean_over_ranks(total.detach())
        metrics["grad_norm"] = self.optimiser.grad_norm()
        values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        finite = bool(np.isfinite(values["loss/total"]) and np.isfinite(values["grad_norm"]))
        values |= {"nonfinite": float(not finite), "lr": self.optimiser.rate(self.optimiser.updates)}
        if not finite:
            return carry, values, None
        self.optimiser.step()
        self.behavior.after_step()
        self.model.after_step()
        return carry, values, self._write_back(sequence, rows)

    def prepare(self, sequence: Sequence) -> tuple[Tree, Tree]:
        """(trained rows [B, T, ...] on the device, state before them [B, ...])."""
        columns, context = sequence.columns, sequence.context
        size, rows = sequence.shape
        if rows <= context:
            raise SchemaError(
                f"sequence of {rows} rows with {context} context rows leaves nothing to train on; "
                "raise the batch length"
            )
        trained = {
            k: self._tensor(columns[k][:, context:]) for k in ("reward", "is_first", "is_last", "is_terminal")
        }
        # An episode that its actor abandoned has no last row: what precedes a first row was one, or returns
        # would run on into the next episode.
        trained["is_last"] = trained["is_last"].clone()
        trained["is_last"][:, :-1] |= trained["is_first"][:, 1:]
        action = encode_action(self._tensor(columns["action"]), self.env.action)  # [B, C + T, A]
        before = (
            action[:, context - 1 : -1]
            if context
            else torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
        )
        batch: Tree = trained | {
            "obs": {k: self._tensor(columns[k][:, context:]) for k in self.env.obs},
            "prev_action": before,
        }
        if sequence.weights is not None:
            batch["weight"] = self._tensor(sequence.weights)
        if not context:
            return batch, self.model.initial(size)
        start = {
            "deter": unpack_float(columns["deter"][:, context - 1], self.device),  # type: ignore[arg-type]
            "stoch": unpack_one_hot(columns["stoch"][:, context - 1], self.classes, self.device),  # type: ignore[arg-type]
        }
        return batch, start

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        # The arrays belong to the reader's ring and may be read-only: torch wants them writable.
        array = array if array.flags.writeable else array.copy()
        return torch.from_numpy(array).to(self.device)

    def _losses(self, batch: Tree, start: Tree) -> tuple[Tensor, dict[str, Tensor], Tree]:
        size, time = batch["reward"].shape
        model_noise = self.model.noise(size, time, self.generator)
        behavior_noise = self.behavior.noise(size, time, self.generator)
        starts = behavior_noise["action"].shape[0]
        behavior_noise |= self.model.noise(starts, self.behavior.horizon, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            model = self.model.loss(batch, start, model_noise)
            behavior = self.behavior.loss(self.model, batch, model.states, behavior_noise)
        return model.total + behavior.total, model.metrics | behavior.metrics, model.rows | behavior.rows

    def _write_back(self, sequence: Sequence, rows: Tree) -> WriteBack:
        latents = {"deter": pack_float(rows["deter"]), "stoch": pack_one_hot(rows["stoch"])}
        priority = None
        if "error" in rows:
            trained = sequence.shape[1] - sequence.context
            priority = row_priority(rows["error"], trained).to("cpu").numpy()
        return WriteBack(ids=sequence.ids, offset=sequence.context, columns=latents, priority=priority)

    def weights(self) -> dict[str, NDArray[np.generic]]:
        """What an acting policy needs, float32 copies by name."""
        out: dict[str, NDArray[np.generic]] = {}
        for full, parameter in self.module.named_parameters():
            name = full.split(".", 1)[1]
            if name.startswith(self.behavior.actor_keys):
                out[name] = parameter.detach().to("cpu", copy=True).numpy()
        return out

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as nested dicts of arrays and numbers."""
        slow = {name: p.detach().to("cpu", copy=True).numpy() for name, p in self._slow().items()}
        return {
            "parameters": self.parameters.to_arrays(self.parameters.values),
            "slow": slow,
            "optimiser": self.optimiser.state(),
            "returns": self.behavior.returns.pair.to("cpu", copy=True).numpy(),
            "rng": self.generator.get_state().numpy(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; nothing changes when any part does not fit.

        Raises: SchemaError when the state belongs to another model.
        """
        shapes = dict(zip(self.parameters.names, self.parameters.shapes, strict=True))
        optimiser = state["optimiser"]
        check_arrays(shapes, state["parameters"], "weights of the checkpoint")
        check_arrays(shapes, optimiser["rms"], "optimiser moments of the checkpoint")
        check_arrays(shapes, optimiser["momentum"], "optimiser moments of the checkpoint")
        slow = self._slow()
        check_arrays(
            {k: tuple(p.shape) for k, p in slow.items()}, state["slow"], "slow critic of the checkpoint"
        )
        self.parameters.from_arrays(self.parameters.values, state["parameters"], "weights of the checkpoint")
        self.optimiser.load(optimiser["rms"], optimiser["momentum"], optimiser["updates"])
        with torch.no_grad():
            for name, parameter in slow.items():
                parameter.copy_(torch.from_numpy(np.asarray(state["slow"][name], np.float32)))
        self.behavior.returns.pair.copy_(torch.from_numpy(np.asarray(state["returns"], np.float32)))
        self._restore_generator(np.array(state["rng"], np.uint8))

    def _restore_generator(self, saved: NDArray[np.uint8]) -> None:
        """Go on in the saved random stream; one of another kind of device only seeds a new stream."""
        if saved.size == self.generator.get_state().numel():
            self.generator.set_state(torch.from_numpy(saved))
        else:  # trained on a GPU and evaluated on a CPU, say: their generators have nothing in common
            self.generator.manual_seed(zlib.crc32(saved.tobytes()))

    def _slow(self) -> dict[str, Tensor]:
        return dict(self.behavior.slow.named_parameters())
