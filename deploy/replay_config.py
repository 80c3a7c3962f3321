"""How a run keeps and uses its experience: the `replay` section of `deploy.run_config`.

Importable without any part of the replay; `deploy.assemble` passes the values to constructors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from system.config import StrictConfig
from system.specs import NAME


class SamplingConfig(StrictConfig):
    """Shares of the selectors in every batch; they are divided by their sum."""

    uniform: float = Field(1.0, ge=0)
    """Share drawn uniformly over all legal starts."""
    online: float = Field(0.0, ge=0)
    """Share that shows every new row once, then draws uniformly."""
    recency: float = Field(0.0, ge=0)
    """Share that prefers young rows."""
    prioritized: float = Field(0.0, ge=0)
    """Share drawn by the priorities the learner writes back."""
    recency_power: float = Field(3.0, ge=1, le=100, allow_inf_nan=False)
    """How much `recency` prefers the young: the youngest share x of a stream's starts gets the share
    x ** (1 / recency_power) of the draws; 1 is uniform."""
    online_backlog: int = Field(4096, ge=1, le=1 << 24)
    """New windows that `online` keeps waiting; when there are more, the oldest are left to the others."""

    @property
    def shares(self) -> dict[str, float]:
        """Selectors in use by name."""
        every = {
            "uniform": self.uniform,
            "online": self.online,
            "recency": self.recency,
            "prioritized": self.prioritized,
        }
        return {name: share for name, share in every.items() if share > 0}


class PriorityConfig(StrictConfig):
    """What makes rows worth replaying sooner."""

    signal: Literal["none", "model", "value"] = "none"
    """What the learner writes back: none, the error of the world model, or that of the value."""
    exponent: float = Field(0.6, ge=0, le=2)
    """Power of the priority in the draw; 0 is uniform."""
    importance: float = Field(0.4, ge=0, le=1)
    """Power of the weights that undo the preference in the loss; 0 leaves it, 1 undoes it fully."""
    half_life: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Batches until a priority has faded half-way to the highest one, which new rows have; 0: it stays."""


class SourceConfig(StrictConfig):
    """Another replay, read only, mixed into every batch."""

    path: Path
    """Replay root, as `dreamfleet replay import` or an earlier run made it."""
    weight: float = Field(1.0, gt=0)
    """Share of the rows of a batch, beside the run's own share of `replay.own_weight`."""

    @field_validator("path")
    @classmethod
    def _path_holds_everywhere(cls, path: Path) -> Path:
        """Processes of a run may work in other folders."""
        return path.expanduser().absolute()


class ReplayConfig(StrictConfig):
    """Where experience rests, and how hard it is trained on."""

    shards: int = Field(2, ge=1, le=1024)
    """Shard processes, each owning one directory."""
    capacity: int = Field(1_000_000, ge=128)
    """Rows kept over all shards; the oldest whole segments go first."""
    capacity_bytes: int | None = Field(None, ge=1 << 20)
    """Bytes kept on disk over all shards, whichever of the two is reached first; none: rows alone decide."""
    max_age_seconds: float | None = Field(None, gt=0)
    """Age after which whole segments go; none: no limit."""
    segment_rows: int | None = Field(None, ge=64)
    """Rows of a whole segment, a multiple of 64; none: chosen from the size of a row."""
    train_ratio: float = Field(32.0, gt=0)
    """Trained rows per inserted row, counted after prefill."""
    prefill: int = Field(1024, ge=0)
    """Rows inserted before training starts."""
    tolerance: int | None = Field(None, ge=1)
    """Rows that inserts may run ahead of training or behind; none: fits the traffic, so that every minute
    holds the train ratio within about half a percent, or one update."""
    sampling: SamplingConfig = SamplingConfig.model_construct()
    priority: PriorityConfig = PriorityConfig.model_construct()
    sources: dict[str, SourceConfig] = Field(default_factory=dict[str, SourceConfig])
    """Other replays by name, mixed into every batch by weight."""
    own_weight: float = Field(1.0, ge=0)
    """Weight of the run's own rows beside `sources`."""
    resume: Literal["keep", "exact", "fresh"] = "keep"
    """What a resumed learner finds: all rows, the rows its checkpoint knew (pinned on disk), or none."""
    evolve: bool = False
    """A run whose environment shows other keys than its replay holds goes on in it; off: it is refused."""
    defaults: dict[str, float] = Field(default_factory=dict[str, float])
    """What obs keys read as in rows stored before the environment showed them, by key."""
    durability: Literal["process", "interval", "flush"] = "process"
    """Acknowledged rows survive: any process; power loss but for the last flush_seconds; power loss."""
    flush_seconds: float = Field(10.0, gt=0)
    """Time between two flushes to the device with durability `interval`."""
    compress: Literal["auto", "off"] = "off"
    """auto: sealed segments are compressed, column by column, where that pays; off: all stay raw."""
    cold_after: int = Field(4, ge=0)
    """Newest sealed segments of each shard that stay raw, with compress `auto`."""
    far: str | None = Field(None, min_length=1)
    """URL of an object store (fsspec) for old segments, e.g. s3://bucket/prefix; none: all stay here."""
    far_after: int = Field(16, ge=0)
    """Newest sealed segments of each shard that stay on the local disk, with `far`."""
    scrub_seconds: float = Field(3600.0, ge=0)
    """Time between two checks of the checksums of everything at rest; 0: only at opening."""

    @model_validator(mode="after")
    def _parts_agree(self) -> ReplayConfig:
        """Refuse what contradicts itself."""
        shares = self.sampling.shares
        if not shares:
            raise ValueError("replay.sampling must have a share > 0; e.g. set replay.sampling.uniform=1")
        if ("prioritized" in shares) != (self.priority.signal != "none"):
            raise ValueError(
                f"replay.sampling.prioritized ({self.sampling.prioritized:g}) and replay.priority.signal "
                f"({self.priority.signal!r}) must be set together; give both or neither"
            )
        if not self.sources and self.own_weight == 0:
            raise ValueError("replay.own_weight (0) must be > 0 without replay.sources; name a source")
        for name in self.sources:
            if not NAME.fullmatch(name):
                raise ValueError(f"replay.sources name {name!r} must match {NAME.pattern}; rename it")
        if self.far is not None and self.compress == "auto" and self.far_after < self.cold_after:
            raise ValueError(
                f"replay.far_after ({self.far_after}) must be >= replay.cold_after ({self.cold_after}); "
                "segments are compressed before they are sent away: raise far_after"
            )
        return self
