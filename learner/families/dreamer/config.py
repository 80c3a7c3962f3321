"""Every number of the DreamerV3 agent. Imports no torch: recipes are checked on machines that have none.

Defaults are those of the current official code (github.com/danijar/dreamerv3, commit e3f0224) and the Nature
paper; each deviation is marked where it stands. Model sizes are rows of `SIZES`; a field set explicitly wins.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Literal["nano", "size1m", "size12m", "size25m", "size50m", "size100m", "size200m", "size400m"]


def _row(deter: int, hidden: int, classes: int) -> dict[str, Any]:
    """Official rows: CNN depth equals classes, units equal hidden."""
    return {"deter": deter, "hidden": hidden, "classes": classes, "depth": classes, "units": hidden}


SIZES: dict[str, dict[str, Any]] = {
    # Ours, not official: small enough that two CPU cores learn CartPole in minutes. Fewer and smaller
    # latents, shallower networks, a learning rate and warmup for thousands of updates instead of millions,
    # and imagination from the last rows of each sequence only.
    "nano": _row(128, 64, 8)
    | {
        "depth": 4,
        "stoch": 16,
        "blocks": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "actor_layers": 2,
        "critic_layers": 2,
        "lr": 1e-3,
        "warmup": 100,
        "imagination_starts": 128,
    },
    "size1m": _row(512, 64, 4),
    "size12m": _row(2048, 256, 16),
    "size25m": _row(3072, 384, 24),
    "size50m": _row(4096, 512, 32),
    "size100m": _row(6144, 768, 48),
    "size200m": _row(8192, 1024, 64),
    "size400m": _row(12288, 1536, 96),
}


class LossScales(BaseModel):
    """Weights of the loss terms in the one sum that is minimised."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    reconstruction: float = Field(default=1.0, ge=0)
    """Factor on every observation key's loss."""
    reward: float = Field(default=1.0, ge=0)
    """Factor on the reward prediction loss, in nats."""
    cont: float = Field(default=1.0, ge=0)
    """Factor on the continuation prediction loss, in nats."""
    dyn: float = Field(default=1.0, ge=0)
    """Factor on KL(sg(posterior) || prior). The 2023 preprint: 0.5."""
    rep: float = Field(default=0.1, ge=0)
    """Factor on KL(posterior || sg(prior))."""
    policy: float = Field(default=1.0, ge=0)
    """Factor on the REINFORCE loss of the actor."""
    value: float = Field(default=1.0, ge=0)
    """Factor on the critic loss over imagined states, in nats."""
    replay_value: float = Field(default=0.3, ge=0)
    """Factor on the critic loss over replayed states, in nats; its gradient reaches the world model."""


EXECUTION: frozenset[str] = frozenset({"backend", "compile", "graph"})
"""Settings that say how an update is computed, not what: a checkpoint moves between their values."""


class DreamerConfig(BaseModel):
    """One DreamerV3 agent."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: Size = "size1m"
    """Row of `SIZES` that fills every field not set explicitly. The official default is size200m."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type of matrix products; parameters, norms and losses stay float32. Official: bf16 on GPUs."""

    backend: Literal["auto", "torch", "native"] = "auto"
    """Who computes the hot regions. auto: a library compiled on first use, for fp32 on CPUs, else torch."""
    compile: Literal["auto", "off"] = "off"
    """auto: loop bodies of the torch backend are compiled in the background and taken up when ready, at a
    moment that differs between runs: not for exact mode. Off: on CPUs the native backend is faster."""
    graph: Literal["auto", "off"] = "auto"
    """auto: on CUDA the whole update is captured once as a graph and replayed. Elsewhere it means nothing."""

    deter: int = Field(default=512, ge=8)
    """Units of the recurrent state."""
    hidden: int = Field(default=64, ge=8)
    """Units of the layers around the recurrent state."""
    stoch: int = Field(default=32, ge=1)
    """Categorical variables of the stochastic state."""
    classes: int = Field(default=4, ge=2, le=256)
    """Classes of each categorical variable; they travel as uint8."""
    blocks: int = Field(default=8, ge=1)
    """Diagonal blocks of the recurrent weights, and of the decoder's spatial input."""
    unimix: float = Field(default=0.01, ge=0, lt=1)
    """Share of the uniform distribution mixed into prior and posterior."""
    prior_layers: int = Field(default=2, ge=1, le=64)
    """Hidden layers of the prior. The posterior and the recurrent step have one, at every official size."""
    free_nats: float = Field(default=1.0, ge=0)
    """Nats below which the KL, summed over variables, is not pushed further."""

    units: int = Field(default=64, ge=8)
    """Units of every MLP outside the recurrent part."""
    depth: int = Field(default=4, ge=1)
    """Base channels of the CNN."""
    mults: tuple[int, ...] = Field(default=(2, 3, 4, 4), min_length=1)
    """Channel multipliers per CNN level; images of up to 32 pixels use the last ones only (ours)."""
    kernel: int = Field(default=5, ge=1)
    """Side of the CNN kernels in pixels; odd."""
    encoder_layers: int = Field(default=3, ge=1, le=64)
    """Hidden layers of the vector encoder."""
    decoder_layers: int = Field(default=3, ge=1, le=64)
    """Hidden layers of the vector decoder."""
    reward_layers: int = Field(default=1, ge=1, le=64)
    """Hidden layers of the reward head."""
    cont_layers: int = Field(default=1, ge=1, le=64)
    """Hidden layers of the continuation head."""
    actor_layers: int = Field(default=3, ge=1, le=64)
    """Hidden layers of the actor."""
    critic_layers: int = Field(default=3, ge=1, le=64)
    """Hidden layers of the critic."""
    bins: int = Field(default=255, ge=3)
    """Bins of reward and value, symexp-spaced over symexp(+-20); odd."""
    actor_outscale: float = Field(default=0.01, ge=0)
    """Factor on the initial output weights of the actor."""
    actor_unimix: float = Field(default=0.0, ge=0, lt=1)
    """Uniform share in discrete policies. Paper: 0.01; the official code declares it but never applies it."""
    min_std: float = Field(default=0.1, gt=0)
    """Smallest standard deviation of continuous policies."""
    max_std: float = Field(default=1.0, gt=0)
    """Largest standard deviation of continuous policies."""

    horizon: int = Field(default=15, ge=1)
    """Imagined steps."""
    imagination_starts: int = Field(default=0, ge=0)
    """Imagined trajectories per update, taken as the last rows of each sequence; 0 takes every row."""
    discount_horizon: float = Field(default=333.0, gt=1)
    """Steps h of the discount 1 - 1/h, which is folded into the continuation target."""
    lambda_: float = Field(default=0.95, ge=0, le=1)
    """Mixing of the lambda-return."""
    entropy: float = Field(default=3e-4, ge=0)
    """Factor on the policy entropy, against normalised returns."""
    return_rate: float = Field(default=0.01, gt=0, le=1)
    """EMA rate of the return percentiles, per update."""
    return_low: float = Field(default=0.05, ge=0, le=1)
    """Lower return percentile, as a fraction."""
    return_high: float = Field(default=0.95, ge=0, le=1)
    """Upper return percentile, as a fraction."""
    return_floor: float = Field(default=1.0, gt=0)
    """Smallest divisor of the advantage, in units of return."""
    slow_rate: float = Field(default=0.02, gt=0, le=1)
    """EMA rate of the slow critic, per update."""
    slow_weight: float = Field(default=1.0, ge=0)
    """Factor on the critic's loss towards the slow critic, which only regularises: it never bootstraps."""
    scales: LossScales = Field(default_factory=LossScales)
    """Weights of the loss terms."""

    lr: float = Field(default=4e-5, gt=0)
    """Learning rate after the warmup."""
    warmup: int = Field(default=1000, ge=0)
    """Updates over which the learning rate grows linearly from 0."""
    agc: float = Field(default=0.3, ge=0)
    """Largest gradient norm of a tensor, relative to its weight norm; 0 turns clipping off."""
    agc_floor: float = Field(default=1e-3, gt=0)
    """Weight norm assumed for tensors near zero."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the momentum."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the squared-gradient average."""
    eps: float = Field(default=1e-20, gt=0)
    """Added to the root of the squared-gradient average."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return SIZES.get(data.get("size", "size1m"), {}) | data

    @model_validator(mode="after")
    def _check(self) -> DreamerConfig:
        if self.deter % self.blocks:
            raise ValueError(f"deter ({self.deter}) must be a multiple of blocks ({self.blocks})")
        if self.depth * self.mults[-1] % self.blocks:
            raise ValueError(
                f"depth * mults[-1] ({self.depth} * {self.mults[-1]}) must be a multiple of blocks "
                f"({self.blocks}), which cut the decoder's channels; change depth, mults or blocks"
            )
        if self.bins % 2 == 0 or self.kernel % 2 == 0:
            raise ValueError(f"bins ({self.bins}) and kernel ({self.kernel}) must be odd")
        if not self.return_low < self.return_high:
            raise ValueError(f"return_low ({self.return_low}) must be < return_high ({self.return_high})")
        if not self.min_std <= self.max_std:
            raise ValueError(f"min_std ({self.min_std}) must be <= max_std ({self.max_std})")
        return self
