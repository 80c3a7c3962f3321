"""What a run is: one frozen model, composed from a recipe, `--set` overrides and defaults.

Importable without torch, ray or an environment. `assemble` turns its values into objects; nothing
below a constructor sees this model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from deploy.replay_config import ReplayConfig
from learner.health.settings import HealthSettings
from system.config import Layers, StrictConfig, build, parse_assignment, read_yaml
from system.errors import ConfigError
from system.specs import NAME

RECIPES = Path(__file__).parent / "recipes"


class EnvConfig(StrictConfig):
    """Which environment, and how its adapter is set."""

    name: str
    """Adapter and task: envpool:<Task>, gym:<id>, dmc:<domain_task>, toy:<name> or module:callable."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Adapter options: action_repeat, image sizes, drop_obs, and the task's own keywords."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Longest wait for one environment step before the environment counts as hung."""


class ActorsConfig(StrictConfig):
    """How experience is collected."""

    count: int = Field(2, ge=0, le=4096)
    """Actor processes; 0: train from `replay.sources` alone, for `updates` updates."""
    envs: int = Field(8, ge=1, le=4096)
    """Environments in each actor, stepped as one batch."""
    chunk_rows: int = Field(16, ge=1, le=64)
    """Rows of one environment per append; at most this many are lost with an actor."""
    chunk_seconds: float = Field(1.0, gt=0)
    """Longest time a row waits in the actor before it is sent."""
    pull_seconds: float = Field(0.25, gt=0)
    """Least time between two looks for newer weights."""
    cpus: float = Field(0.5, ge=0)
    """CPUs reserved for each actor in Ray's bookkeeping."""


class LearnerConfig(StrictConfig):
    """The learning side."""

    family: str = "dreamer"
    """World-model family, a key of learner.catalog.FAMILIES."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the family; its own config model validates them."""
    batch: int = Field(16, ge=1)
    """Sequences per update, B."""
    length: int = Field(64, ge=2)
    """Trained rows per sequence, T."""
    context: int = Field(1, ge=0, le=64)
    """Rows before them that only supply latents."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto says what it took, cuda never falls back."""
    threads: int = Field(1, ge=1)
    """CPU threads of the learner."""
    prefetch: int = Field(2, ge=0, le=64)
    """Batches drawn ahead."""
    publish_updates: int = Field(4, ge=1)
    """Updates between two published versions."""
    ranks: int = Field(1, ge=1, le=64)
    """Processes that share every batch and learn as one, each with a GPU of its own or all on the CPU."""
    rank_timeout: float = Field(5.0, ge=1, le=600)
    """Seconds without a sign of life after which a rank is lost; one that lives must keep up all the same."""
    launch: Literal["backend", "torchrun"] = "backend"
    """Who starts the ranks: the backend of the run, or torchrun (then backend must be local)."""
    checkpoint_seconds: float = Field(60.0, gt=0)
    """Time between two checkpoints."""
    keep_checkpoints: int = Field(3, ge=1)
    """Checkpoints kept on disk."""
    health: HealthSettings = HealthSettings.model_construct()
    """When the health monitor raises alarms."""

    @field_validator("device")
    @classmethod
    def _device_is_one(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("must be auto, cpu, cuda or cuda:<index>")
        return device


class EvaluationConfig(StrictConfig):
    """How the policy is judged."""

    episodes: int = Field(20, ge=1)
    """Episodes of the final evaluation, greedy actions."""
    max_seconds: float = Field(300.0, gt=0)
    """Longest time of one evaluation."""
    envs: int = Field(4, ge=1)
    """Environments used side by side."""


class ServicesConfig(StrictConfig):
    """Addresses and credentials of the processes."""

    host: str = "127.0.0.1"
    """Address every service listens on; beyond loopback mutual TLS and tokens are required."""
    params_port: int = Field(0, ge=0, le=65535)
    """Port of the parameter server; 0 picks a free one."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port of the driver's /metrics; 0 picks a free one. Other roles always pick."""
    certificate: Path | None = None
    """PEM certificate of this deployment."""
    private_key: Path | None = None
    """PEM key of the certificate."""
    authority: Path | None = None
    """PEM authority that signed every peer's certificate."""
    token_file: Path | None = None
    """YAML file (mode 0600) mapping role to bearer token."""


class RunConfig(StrictConfig):
    """A whole run."""

    name: str = "run"
    """Directory name under `root`."""
    root: Path = Path("runs")
    """Where run directories live."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    backend: Literal["ray", "local"] = "ray"
    """ray: roles on a Ray cluster (started here if none runs); local: plain processes."""
    env_steps: int = Field(1_000_000, ge=1)
    """Inserted rows after which the run ends."""
    updates: int | None = Field(None, ge=1)
    """Updates after which the run ends even if env_steps are not reached; none: no limit."""
    max_seconds: float | None = Field(None, gt=0)
    """Wall time after which the run ends early; none: no limit."""
    silent_seconds: float = Field(120.0, gt=0)
    """A role that says nothing for this long is restarted."""
    max_restarts: int = Field(20, ge=0)
    """Restarts of one role within ten minutes before the run gives up."""
    env: EnvConfig
    actors: ActorsConfig = ActorsConfig.model_construct()
    replay: ReplayConfig = ReplayConfig.model_construct()
    learner: LearnerConfig = LearnerConfig.model_construct()
    evaluation: EvaluationConfig = EvaluationConfig.model_construct()
    services: ServicesConfig = ServicesConfig.model_construct()

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"must match {NAME.pattern}; use letters, digits, '.', '_' and '-'")
        return name

    @model_validator(mode="after")
    def _ranks_fit(self) -> RunConfig:
        learner = self.learner
        if learner.batch % learner.ranks:
            down = learner.batch // learner.ranks * learner.ranks
            batches = [str(size) for size in (down, down + learner.ranks) if size]
            divisors = [str(n) for n in range(1, learner.batch + 1) if learner.batch % n == 0]
            raise ValueError(
                f"learner.batch ({learner.batch}) must be divisible by learner.ranks ({learner.ranks}): "
                f"they get equal parts of every batch; set learner.batch to {' or '.join(batches)}, or "
                f"learner.ranks to one of {', '.join(divisors)}"
            )
        if learner.ranks > 1 and ":" in learner.device:
            raise ValueError(
                f"learner.device ({learner.device}) is one card and learner.ranks is {learner.ranks}; set "
                "learner.device=cuda: rank k then takes card k"
            )
        if learner.launch == "torchrun" and self.backend != "local":
            raise ValueError(
                f"learner.launch=torchrun works with backend=local, not {self.backend}; set backend=local "
                "or leave the launching to the backend"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> RunConfig:
        """Refuse what could never train."""
        if self.offline:
            return self._offline_fits()
        streams = self.actors.count * self.actors.envs
        rows = self.learner.length + self.learner.context
        # Actors have home shards, so that of several a shard may have more streams than another.
        fullest = math.ceil(self.actors.count / self.replay.shards) * self.actors.envs
        share = self.shard_capacity // fullest
        if rows > share:
            raise ValueError(
                f"learner.length + context ({rows}) must be <= replay.capacity / streams "
                f"in the fullest shard ({self.shard_capacity} / {fullest} = {share}); lower learner.length, "
                "raise replay.capacity or use at most as many replay.shards as actors"
            )
        least = rows * streams
        if self.replay.prefill > self.replay.capacity:
            raise ValueError(
                f"replay.prefill ({self.replay.prefill}) must be <= replay.capacity "
                f"({self.replay.capacity}); "
                "lower the prefill"
            )
        if max(self.replay.prefill, least) >= self.env_steps:
            raise ValueError(
                f"env_steps ({self.env_steps}) must be > prefill ({self.replay.prefill}) and > one "
                "sequence per "
                f"stream ({least}), or nothing is ever trained; raise env_steps or lower learner.length"
            )
        return self

    def _offline_fits(self) -> RunConfig:
        if self.updates is None:
            raise ValueError("updates (none) must be set with actors.count=0, or the run never ends; set it")
        if not self.replay.sources or self.replay.own_weight:
            raise ValueError(
                f"actors.count=0 needs replay.sources ({sorted(self.replay.sources)}) and "
                f"replay.own_weight=0 ({self.replay.own_weight:g}): there are no rows but those of the "
                "sources; set both"
            )
        return self

    @property
    def planned_updates(self) -> float:
        """Updates of the whole run, as far as its settings tell."""
        owed = max(0, self.env_steps - self.prefill) * self.replay.train_ratio / self.batch_rows
        return owed if self.updates is None else self.updates if self.offline else min(owed, self.updates)

    @property
    def offline(self) -> bool:
        """No actors: the learner trains from `replay.sources` alone."""
        return self.actors.count == 0

    @property
    def shard_count(self) -> int:
        """Shard processes of the run."""
        return 0 if self.offline else self.replay.shards

    @property
    def batch_rows(self) -> int:
        return self.learner.batch * self.learner.length

    @property
    def tolerance(self) -> int:
        """Rows that inserts may run ahead of training, and behind; unless asked for, a bound that the
        limiter stays within: two rounds of appends, or four updates.
        """
        updates = math.ceil(4 * self.batch_rows / self.replay.train_ratio)
        return self.replay.tolerance or max(2 * self.chunk_total, updates)

    @property
    def chunk_total(self) -> int:
        """Rows of one round of appends from all actors."""
        return self.actors.count * self.actors.envs * self.actors.chunk_rows

    @property
    def prefill(self) -> int:
        """Rows before training: the asked prefill, and at least one full sequence in every stream."""
        streams = self.actors.count * self.actors.envs
        rows = self.learner.length + self.learner.context
        return max(self.replay.prefill, rows * streams)

    @property
    def shard_capacity(self) -> int:
        """Rows one shard keeps."""
        return max(64, self.replay.capacity // self.replay.shards)

    @property
    def directory(self) -> Path:
        return self.root / self.name


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """A shipped recipe by name, or any YAML file by path. Raises: ConfigError with the nearest name."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"recipe file {recipe!r} does not exist; check the path")
        return path
    path = RECIPES / f"{recipe}.yaml"
    if NAME.fullmatch(recipe) and path.is_file():
        return path
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(recipe_names())}"
    raise ConfigError(f"unknown recipe {recipe!r}; {hint} (or pass a path ending in .yaml)")


def compose(
    recipe: str, assignments: Sequence[str] = (), extra: dict[str, Any] | None = None
) -> tuple[RunConfig, Layers]:
    """Resolve a recipe and overrides into a validated run. Raises: ConfigError."""
    path = find_recipe(recipe)
    values, lines = read_yaml(path)
    layers = Layers().add({"name": path.stem}, "recipe file name").add(values, path.name, lines)
    for text in assignments:
        layers.add(parse_assignment(text), "--set")
    if extra:
        layers.add(extra, "command line")
    config = build(RunConfig, layers)
    if "name" not in values and layers.origin.get("name") == "recipe file name":
        layers.add({"name": f"{path.stem}-{config.seed}"}, "recipe file name and seed")
        config = build(RunConfig, layers)
    return config, layers
