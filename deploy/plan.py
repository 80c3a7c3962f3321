"""`--dry-run`: what a run would be, before anything is started: config with origins, processes, bytes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from deploy.assemble import rate_limiter, security, table_spec
from deploy.probe import probe_env
from deploy.run_config import RunConfig
from system.config import Layers, dump_with_origin
from system.errors import ConfigError
from system.specs import EnvSpec, TableSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Made by `plan`, shown by the command line."""

    config: RunConfig
    env_spec: EnvSpec
    row_bytes: int
    replay_bytes: int
    updates: int
    processes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in asdict(self).items() if k not in ("config", "env_spec")}
        return values | {"config": self.config.model_dump(mode="json"), "env_spec": self.env_spec.to_json()}

    def text(self, layers: Layers) -> str:
        obs = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in self.env_spec.obs.items())
        action = self.env_spec.action
        shown = (
            f"discrete {list(action.classes)}" if action.kind == "discrete" else f"continuous [{action.size}]"
        )
        roles = ", ".join(f"{n} {role}" for role, n in self.processes.items())
        return (
            f"{dump_with_origin(self.config, layers)}\n"
            f"plan: {roles} on backend {self.config.backend}\n"
            f"  observations  {obs}\n  actions       {shown}\n"
            f"  replay        {self.row_bytes} bytes per row, at most "
            f"{self.replay_bytes / 2**20:.0f} MiB on disk\n"
            f"  training      {self.updates} updates of {self.config.learner.batch} x "
            f"{self.config.learner.length} rows\n"
            f"  run directory {self.config.directory.absolute()}\n"
            "nothing was started (--dry-run)"
        )


def check_settings(config: RunConfig, env_spec: EnvSpec) -> TableSpec:
    """Refuse what a role would refuse later, before anything exists; return the table.

    Raises: ConfigError for settings that do not fit together, PreflightError for an absent device.
    """
    from replay.geometry import choose_geometry
    from replay.reader import check_fits

    table = table_spec(config, env_spec)
    security(config)
    check_sources(config, env_spec, table)
    rate_limiter(config).check_update(config.batch_rows)
    if not config.offline:
        share = config.shard_capacity
        geometry = choose_geometry(table.row_nbytes, share, config.replay.segment_rows)
        check_fits(share, geometry.total, config.learner.length + config.learner.context)
    device, ranks = config.learner.device, config.learner.ranks
    if config.backend == "local" and (device.startswith("cuda") or (ranks > 1 and device != "cpu")):
        from learner.devices import (  # on a cluster only the learner's node can tell
            rank_device,
            resolve_device,
        )

        resolve_device(rank_device(device, ranks - 1, ranks))
    return table


def check_sources(config: RunConfig, env_spec: EnvSpec, table: TableSpec) -> None:
    """Refuse sources that cannot be mixed into this run's batches.

    Raises: ConfigError when one is missing or holds what the family cannot learn from; SchemaError when its
    rows have another form.
    """
    from learner.catalog import ACTION_FREE_FAMILIES
    from replay.datasets.episodes import about_of_json
    from replay.datasets.ingest import read_about
    from replay.reader import source_tables
    from replay.schema import check_readable, masked

    sources = {name: (source.path, source.weight) for name, source in config.replay.sources.items()}
    tables = source_tables(sources)
    wanted = masked(table, tables)
    for (name, (path, _)), found in zip(sources.items(), tables, strict=True):
        if masked(table, [found]) is not table and config.learner.family not in ACTION_FREE_FAMILIES:
            raise ConfigError(
                f"replay source {name} ({path}) has rows without actions, from which learner.family "
                f"{config.learner.family!r} cannot learn (families that can: "
                f"{sorted(ACTION_FREE_FAMILIES)}); "
                "leave the source out"
            )
        check_readable(path, found, wanted)
        about = read_about(path)
        action = about_of_json(about, str(path)).action if about is not None else None
        if action is not None and any(
            theirs > ours for theirs, ours in zip(action.classes, env_spec.action.classes, strict=True)
        ):
            raise ConfigError(
                f"replay source {name} ({path}) has actions of {list(action.classes)} classes, "
                f"{env_spec.name} takes "
                f"{list(env_spec.action.classes)}; choose the environment that made it"
            )


def plan(config: RunConfig) -> Plan:
    """Probe the environment and add up what the run would use. Raises what `train` would raise."""
    env_spec = probe_env(config.env.name, config.env.options)
    table = check_settings(config, env_spec)
    rows = 0 if config.offline else min(config.replay.capacity, config.env_steps)
    trained = max(0, config.env_steps - config.prefill) * config.replay.train_ratio
    limit = config.updates or math.inf
    updates = limit if config.offline else min(limit, trained // config.batch_rows)
    return Plan(
        config=config,
        env_spec=env_spec,
        row_bytes=table.row_nbytes,
        replay_bytes=rows * table.row_nbytes,
        updates=int(updates),
        processes={
            "params": 1,
            "shard": config.shard_count,
            "learner": config.learner.ranks,
            "actor": config.actors.count,
        },
    )
