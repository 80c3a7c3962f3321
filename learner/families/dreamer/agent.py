"""The DreamerV3 agent: one update of world model, actor and critic per call, under one optimiser.

Implements system.interfaces.Agent. Between `learner.loop`, which brings sequences, and the update as a
function of tensors (`learner.families.dreamer.update`). Letters: B batch, T trained rows, C context rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.backends import choose_backend
from learner.capture import GraphedStep, Recorder
from learner.carrier_state import state_of, write_back_of
from learner.compiled import StepCompiler
from learner.families.dreamer.behavior import ActorCritic
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.latents import latent_columns
from learner.families.dreamer.update import DreamerUpdate
from learner.families.dreamer.world_model import DreamerWorldModel
from learner.health.signals import region_peaks
from learner.interfaces import Stage, Tree, check_needs
from learner.nn.layers import initialise
from learner.nn.optim import FlatParameters, LaProp, check_arrays
from learner.transfer import Arrays, make_download, make_upload
from replay.batch_spec import BatchSpec
from system.experience import Sequence, SequenceIds, WriteBack
from system.seeds import child_seed
from system.specs import EnvSpec

PrioritySignal = Literal["none", "model", "value"]


class Outcome(NamedTuple):
    """What one update reported."""

    metrics: dict[str, float]
    write_back: WriteBack | None  # None when the update was skipped


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
        late: bool = False,
        recorder: Recorder | None = None,
        steps: StepCompiler | None = None,
    ) -> None:
        """`priority_signal`: the error of each row that is written back as its priority, if any.

        `late`: `learn` reports the update before the one it started, so that it never waits for the device.
        `recorder`: records the update on the device, see `learner.capture`. `steps`: compiles loop bodies of
        the torch backend, see `learner.compiled`.
        """
        self.env, self.device, self.late = env, device, late
        self.columns = latent_columns(config)
        self.model = DreamerWorldModel(config, env)
        self.behavior = ActorCritic(config, self.model.feat_size, env.action)
        check_needs("actor-critic", self.behavior.needs, "dreamer", self.model.caps)
        self.model.row_error = priority_signal == "model"
        self.behavior.row_error = priority_signal == "value"
        backend = choose_backend(config.backend, device, config.dtype)
        self.steps = steps if backend.name == "torch" else None
        if self.steps is not None:
            backend = backend._replace(rollout=partial(backend.rollout, choose=self.steps))
        self.model.rssm.rollout, self.behavior.backend = backend.rollout, backend
        self.model.encoder.compute_by(backend.encode)
        self.model.decoder.compute_by(backend.reconstruct)
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
        self.update = DreamerUpdate(
            self.model, self.behavior, self.parameters, self.optimiser, env, bf16=config.dtype == "bf16"
        )
        self._step = GraphedStep(self.update, recorder)
        self._upload, self._download = make_upload(device), make_download(device)
        self._pending: Callable[[], Outcome] | None = None

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

        Metrics: loss/<part>, entropy/<of>, imagined/<what>, grad_norm, lr, nonfinite (0 or 1). When `late`,
        metrics and write-back are those of the update before; the first call returns none.
        """
        inputs = self._upload(self.update.arrays(sequence))
        size, rows = sequence.shape
        noise = self.update.noise(size, rows - sequence.context, self.generator)
        version = 0
        if self.steps is not None:
            self.steps.poll()
            version = self.steps.version
        started = self._report(sequence, self._step(inputs | noise, sequence.context, version))
        self._upload.settle()  # the arrays of the sequence may change once we return
        if self.late:
            self._pending, started = started, self._pending
        if started is None:
            return carry, {}, None
        outcome = started()
        return carry, outcome.metrics, outcome.write_back

    def prepare(self, sequence: Sequence) -> tuple[Tree, Tree]:
        """(trained rows [B, T, ...] on the device, state before them [B, ...])."""
        return self.update.unpack(self._upload(self.update.arrays(sequence)), sequence.context)

    def _report(self, sequence: Sequence, outputs: dict[str, Tensor]) -> Callable[[], Outcome]:
        """Send the outputs of an update on their way; what is returned waits for them."""
        fetch = self._download(outputs)
        names, ids, offset = self.update.names, sequence.ids, sequence.context

        def outcome() -> Outcome:
            arrays = fetch()
            metrics = dict(zip(names, arrays.pop("metrics").tolist(), strict=True))
            if metrics["nonfinite"]:
                return Outcome(metrics, None)
            return Outcome(metrics, _write_back(arrays, ids, offset))

        return outcome

    def weight_peaks(self) -> dict[str, float]:
        """Largest weight of each module, not finite where any entry is not. Waits for the device."""
        peaks = region_peaks(self.parameters.values, self.update.regions)
        return dict(zip(peaks, torch.stack(list(peaks.values())).tolist(), strict=True))

    def weights(self) -> dict[str, NDArray[np.generic]]:
        """What an acting policy needs, float32 copies by name."""
        chosen = {}
        for full, parameter in self.module.named_parameters():
            name = full.split(".", 1)[1]
            if name.startswith(self.behavior.actor_keys):
                chosen[name] = parameter.detach()
        # One transfer, not one per tensor: each would wait for the device.
        flat = torch.cat([p.flatten() for p in chosen.values()]).cpu()
        parts = flat.split([p.numel() for p in chosen.values()])
        return {
            name: part.view(p.shape).numpy() for (name, p), part in zip(chosen.items(), parts, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as nested dicts of arrays and numbers."""
        slow = {name: p.detach().to("cpu", copy=True).numpy() for name, p in self._slow().items()}
        state = {
            "parameters": self.parameters.to_arrays(self.parameters.values),
            "slow": slow,
            "optimiser": self.optimiser.state(),
            "returns": self.behavior.returns.pair.to("cpu", copy=True).numpy(),
            "rng": self.generator.get_state().numpy(),
        }
        if self._pending is not None:  # what the next call of `learn` will report
            metrics, rows = self._pending()
            state["pending"] = {"metrics": metrics, "rows": None if rows is None else state_of(rows)}
        return state

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
        returns = {"returns": np.asarray(state["returns"], np.float32)}
        check_arrays({"returns": (2,)}, returns, "return range of the checkpoint")
        random_stream = np.array(state["rng"], np.uint8)
        self.parameters.from_arrays(self.parameters.values, state["parameters"], "weights of the checkpoint")
        self.optimiser.load(optimiser["rms"], optimiser["momentum"], optimiser["updates"])
        with torch.no_grad():
            for name, parameter in slow.items():
                parameter.copy_(torch.from_numpy(np.asarray(state["slow"][name], np.float32)))
        self.behavior.returns.pair.copy_(torch.from_numpy(returns["returns"]))
        self._restore_generator(random_stream)
        self._pending = None
        if self.late and (pending := state.get("pending")) is not None:
            rows = pending["rows"]
            outcome = Outcome(dict(pending["metrics"]), None if rows is None else write_back_of(rows))
            self._pending = lambda: outcome

    def _restore_generator(self, saved: NDArray[np.uint8]) -> None:
        """Go on in the saved random stream; one of another kind of device only seeds a new stream."""
        if saved.size == self.generator.get_state().numel():
            self.generator.set_state(torch.from_numpy(saved))
        else:  # trained on a GPU and evaluated on a CPU, say: their generators have nothing in common
            self.generator.manual_seed(zlib.crc32(saved.tobytes()))

    def _slow(self) -> dict[str, Tensor]:
        return dict(self.behavior.slow.named_parameters())


def _write_back(arrays: Arrays, ids: SequenceIds, offset: int) -> WriteBack:
    latents = {name: arrays[name] for name in ("deter", "stoch")}
    priority = arrays.get("priority")
    return WriteBack(ids=ids, offset=offset, columns=latents, priority=priority)  # type: ignore[arg-type]
