"""`--dry-run`: what a run would be, before anything is started: config with origins, processes, bytes."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from deploy.assemble import table_spec
from deploy.probe import probe_env
from deploy.run_config import RunConfig
from system.config import Layers, dump_with_origin
from system.specs import EnvSpec


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


def plan(config: RunConfig) -> Plan:
    """Probe the environment and add up what the run would use. Raises what `train` would raise."""
    env_spec = probe_env(config.env.name, config.env.options)
    table = table_spec(config, env_spec)
    if config.learner.device not in ("auto", "cpu") and "torch" not in sys.modules:
        from learner.devices import resolve_device

        resolve_device(config.learner.device)
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
