"""The one place where objects are built from a run's configuration. Everyone else gets collaborators.

Imports of torch and environments happen inside the functions that need them, so a shard process
never loads torch and a learner process never loads an environment.
"""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.run_config import RunConfig
from system.config import read_yaml
from system.errors import ConfigError, PreflightError
from system.metrics import Metrics
from system.seeds import child_seed
from system.specs import EnvSpec, TableSpec
from system.wire import OPEN, Security

if TYPE_CHECKING:
    from actors.actor import Actor
    from learner.health.watch import HealthWatch
    from replay.limiter import RateLimiter
    from replay.pins import PinStore
    from replay.reader import LocalReader
    from replay.selection import Sampling
    from replay.service import ShardServer
    from replay.shard import ReplayShard
    from system.interfaces import Policy
    from system.params.server import ParameterServer


def security(config: RunConfig) -> Security:
    """Credentials from the configured files. Raises: ConfigError, PreflightError."""
    services = config.services
    tokens: dict[str, str] = {}
    if services.token_file is not None:
        mode = stat.S_IMODE(services.token_file.stat().st_mode) if services.token_file.exists() else 0o600
        if mode & 0o077:
            raise PreflightError(
                f"token file {services.token_file} has mode {mode:04o}, must be readable by its "
                "owner alone; chmod 600 it"
            )
        tokens = {str(k): str(v) for k, v in read_yaml(services.token_file)[0].items()}
    paths = (services.certificate, services.private_key, services.authority)
    if any(paths) and not all(paths):
        raise ConfigError("services.certificate, private_key and authority must be given together")
    if not tokens and not any(paths):
        return OPEN
    return Security(tokens=tokens, certificate=paths[0], private_key=paths[1], authority=paths[2])


def table_spec(config: RunConfig, env_spec: EnvSpec) -> TableSpec:
    """Columns of a row: the environment's, and the overlay the model family declares.

    Raises: ConfigError when replay.defaults names a key that the environment does not show.
    """
    from learner.catalog import make_config, overlay_columns

    family, defaults = make_config(config.learner.family, config.learner.settings), config.replay.defaults
    if unknown := sorted(defaults.keys() - env_spec.obs.keys()):
        raise ConfigError(
            f"replay.defaults has keys {unknown} that {env_spec.name} does not show; "
            f"it shows {sorted(env_spec.obs)}: leave them out"
        )
    obs = {key: replace(spec, default=defaults.get(key, spec.default)) for key, spec in env_spec.obs.items()}
    overlay = overlay_columns(config.learner.family, family, env_spec)
    return TableSpec.of(replace(env_spec, obs=obs), overlay)


def params_server(config: RunConfig, port: int, metrics: Metrics) -> ParameterServer:
    from system.params.server import ParameterServer

    return ParameterServer(f"{config.services.host}:{port}", security=security(config), metrics=metrics)


def replay_shard(
    config: RunConfig, env_spec: EnvSpec, run_dir: str, index: int, metrics: Metrics
) -> ReplayShard:
    from replay.layout import shard_dir
    from replay.shard import ReplayShard
    from replay.tiers import stages_of

    replay, root, table = config.replay, Path(run_dir) / "replay", table_spec(config, env_spec)
    return ReplayShard(
        root,
        index,
        table,
        capacity_rows=config.shard_capacity,
        segment_rows=replay.segment_rows,
        capacity_bytes=None if replay.capacity_bytes is None else replay.capacity_bytes // replay.shards,
        max_age_seconds=replay.max_age_seconds,
        durability=replay.durability,
        flush_seconds=replay.flush_seconds,
        scrub_seconds=replay.scrub_seconds,
        stages=stages_of(
            shard_dir(root, index),
            index,
            table,
            compress=replay.compress == "auto",
            cold_after=replay.cold_after,
            far=replay.far,
            far_after=replay.far_after,
        ),
        initial_grant=-(-(config.prefill + config.chunk_total) // config.replay.shards),
        evolve=replay.evolve,
        metrics=metrics,
    )


def shard_server(config: RunConfig, shard: ReplayShard, port: int) -> ShardServer:
    from replay.service import serve_shard

    return serve_shard(shard, f"{config.services.host}:{port}", security=security(config))


def rate_limiter(config: RunConfig) -> RateLimiter:
    from replay.limiter import RateLimiter
    from replay.offline import OfflineLedger

    if config.offline:
        return OfflineLedger()
    return RateLimiter(
        train_ratio=config.replay.train_ratio,
        prefill_rows=config.prefill,
        tolerance_rows=config.tolerance,
        min_rows=config.learner.length + config.learner.context,
        paced=config.replay.tolerance is None,
    )


def sampling(config: RunConfig) -> Sampling:
    """How the starts of sequences are chosen."""
    from replay.selection import Sampling

    sampling, priority = config.replay.sampling, config.replay.priority
    return Sampling(
        shares=sampling.shares,
        exponent=priority.exponent,
        importance=priority.importance,
        half_life=priority.half_life,
        recency=sampling.recency_power,
        backlog=sampling.online_backlog,
    )


def replay_reader(
    config: RunConfig,
    env_spec: EnvSpec,
    run_dir: str,
    shards: tuple[str, ...],
    metrics: Metrics,
    *,
    limiter: RateLimiter | None = None,
    pins: PinStore | None = None,
) -> LocalReader:
    """The learner's reader; with no `shards` and a limiter of one's own, a mere look into the replay.

    Shards that do not lie on this node are read over the wire.
    Raises: ConfigError when that cannot be with replay.resume=exact, and as LocalReader.
    """
    from replay.batch_spec import BatchSpec
    from replay.client import GrpcShardControl
    from replay.layout import shard_dir
    from replay.reader import LocalReader
    from replay.remote import RemoteShard

    replay, root, table = config.replay, Path(run_dir) / "replay", table_spec(config, env_spec)
    credentials = security(config)
    away = [(k, address) for k, address in enumerate(shards) if not shard_dir(root, k).exists()]
    if away and replay.resume == "exact":
        raise ConfigError(
            f"replay.resume=exact needs all shards on the learner's node, shard {away[0][0]} is at "
            f"{away[0][1]}; set replay.resume=keep"
        )
    return LocalReader(
        root,
        table,
        spec=BatchSpec(
            batch=config.learner.batch, length=config.learner.length, context=config.learner.context
        ),
        sampling=sampling(config),
        sources={name: (source.path, source.weight) for name, source in replay.sources.items()},
        own_weight=replay.own_weight,
        seed=child_seed(config.seed, "sampler"),
        limiter=limiter or rate_limiter(config),
        controls=[GrpcShardControl(address, security=credentials) for address in shards],
        remotes=[
            RemoteShard(k, address, table, security=credentials, metrics=metrics) for k, address in away
        ],
        ring=reader_ring(config),
        evolve=replay.evolve,
        before_overwrite=pins.before if pins is not None else None,
        metrics=metrics,
    )


def replay_pins(config: RunConfig, run_dir: str) -> PinStore:
    """What remembers, and in exact mode holds on to, the rows of every checkpoint."""
    from replay.pins import PinStore

    return PinStore(Path(run_dir) / "replay", hold=config.replay.resume == "exact")


def reader_ring(config: RunConfig) -> int:
    """Batches the reader keeps valid: those drawn ahead, one being drawn, one in use."""
    return config.learner.prefetch + 2


def policy(config: RunConfig, env_spec: EnvSpec, *seed_path: str | int) -> Policy:
    """An acting policy without weights: weights arrive through Policy.load."""
    from learner.catalog import make_config, make_policy

    family = make_config(config.learner.family, config.learner.settings)
    return make_policy(config.learner.family, family, env_spec, seed=child_seed(config.seed, *seed_path))


def actor(
    config: RunConfig,
    env_spec: EnvSpec,
    index: int,
    incarnation: int,
    params_address: str,
    shard_addresses: tuple[str, ...],
    metrics: Metrics,
) -> Actor:
    from actors.actor import Actor
    from actors.envs.catalog import make_env
    from replay.client import GrpcReplayWriter
    from replay.homes import HomedWriter, answers
    from system.params.client import GrpcWeightSource

    table = table_spec(config, env_spec)
    credentials = security(config)
    return Actor(
        index,
        incarnation,
        make_env(
            config.env.name,
            config.actors.envs,
            options=config.env.options,
            timeout=config.env.timeout_seconds,
        ),
        policy(config, env_spec, "actor", index, "policy", incarnation),
        HomedWriter(
            index,
            config.actors.count,
            dict(enumerate(shard_addresses)),
            lambda address: GrpcReplayWriter(address, table, security=credentials),
            answers=lambda address: answers(address, credentials),
            metrics=metrics,
        ),
        GrpcWeightSource(params_address, security=credentials),
        table=table,
        chunk_rows=config.actors.chunk_rows,
        chunk_seconds=config.actors.chunk_seconds,
        pull_seconds=config.actors.pull_seconds,
        seed=child_seed(config.seed, "actor", index, "incarnation", incarnation),
        wait_for_policy=True,
        metrics=metrics,
    )


def health_watch(
    config: RunConfig, env_spec: EnvSpec, agent: Any, reader: LocalReader, metrics: Metrics
) -> HealthWatch:
    """What watches the learning of `agent`, and whether `reader` keeps the train ratio."""
    from learner.catalog import make_config, model_facts
    from learner.health.ratio import RatioBooks
    from learner.health.watch import HealthWatch

    def books() -> RatioBooks | None:
        limiter = reader.limiter
        if config.offline or not limiter.prefilled:
            return None
        return RatioBooks(
            inserted=limiter.inserted,
            trained=limiter.trained,
            asked=limiter.train_ratio,
            band_rows=limiter.band_rows,
            owed=limiter.error,
        )

    family = make_config(config.learner.family, config.learner.settings)
    return HealthWatch(
        agent,
        config.learner.health,
        model_facts(config.learner.family, family, env_spec),
        planned_updates=config.planned_updates,
        books=books,
        seed=child_seed(config.seed, "health"),
        metrics=metrics,
    )


def agent(config: RunConfig, env_spec: EnvSpec, *, device: str = "") -> Any:
    """The learning agent on `device`, or the one asked for. Raises: PreflightError when there is none."""
    from learner.catalog import make_agent, make_config

    family = make_config(config.learner.family, config.learner.settings)
    return make_agent(
        config.learner.family,
        family,
        env_spec,
        device=device or config.learner.device,
        seed=child_seed(config.seed, "agent"),
        priority_signal=config.replay.priority.signal,
    )
