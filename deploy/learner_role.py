"""The learner as a role: builds agent, reader, publisher and store, resumes, and runs the learn loop
in slices. The only role that loads torch for training. Neighbours: `learner.loop`, `deploy.roles`.
"""

from __future__ import annotations

from typing import Any

from deploy.run_config import RunConfig
from system.config import flatten
from system.specs import EnvSpec


def signature(config: RunConfig, env_spec: EnvSpec) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that loads it: model family, its settings, the spaces."""
    from learner.catalog import make_config

    family = make_config(config.learner.family, config.learner.settings)
    env = env_spec.to_json()
    return {
        "family": config.learner.family,
        **flatten(family, "settings."),
        **flatten({"obs": env["obs"], "action": env["action"]}),
    }
