"""`--dry-run`: what a run would be, before anything is started: config with origins, processes, bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deploy.assemble import rate_limiter, security, table_spec
from deploy.probe import probe_env
from deploy.run_config import RunConfig
from system.config import Layers, dump_with_origin
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
    from replay.reader import check_fits
    from replay.geometry import choose_geometry

    table = table_spec(config, env_spec)
    security(config)
    rate_limiter(config).check_update(config.batch_rows)
    share = config.shard_capacity
    geometry = choose_geometry(table.row_nbytes, share, config.replay.segment_rows)
    check_fits(share, geometry.total, config.learner.length + config.learner.context)
    if config.backend == "local" and config.learner.device not in ("auto", "cpu"):
        from learner.devices import resolve_device  # on a cluster only the learner's node can tell

        resolve_device(config.learner.device)
    return table


def plan(config: RunConfig) -> Plan:
    """Probe the environment and add up what the run would use. Raises what `train` would raise."""
    env_spec = probe_env(config.env.name, config.env.options)
    table = check_settings(config, env_spec)
    rows = min(config.replay.capacity, config.env_steps)
    trained = max(0, config.env_steps - config.prefill) * config.replay.train_ratio
    return Plan(
        config=config,
        env_spec=env_spec,
        row_bytes=table.row_nbytes,
        replay_bytes=rows * table.row_nbytes,
        updates=int(trained // config.batch_rows),
        processes={"params": 1, "shard": config.replay.shards, "learner": 1, "actor": config.actors.count},
    )
