"""One training step of RLlib's DreamerV3 learner, at the official size1m where it has such a size.

It is the 2023 algorithm: dense GRU (three times the products), no replay value loss, three optimisers and
three backward passes; its CNN is kernel 4, stride 2. Read its rows as those of another model.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from types import ModuleType

import gymnasium as gym
import numpy as np
import ray.rllib.algorithms.dreamerv3 as dreamerv3
import torch
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from bench.peers import learner_load as load

MODULE = "default_policy"
SIZES = {
    "get_cnn_multiplier": 8,  # its smallest channels: 8, 16, 32, 64
    "get_dense_hidden_units": load.UNITS,
    "get_gru_units": load.DETER,
    "get_num_z_categoricals": load.STOCH,
    "get_num_z_classes": load.CLASSES,
    "get_num_dense_layers": 3,
}


def resize() -> None:
    """Replace the size table in every module that has imported it: no setting reaches it."""
    found = pkgutil.walk_packages(dreamerv3.__path__, f"{dreamerv3.__name__}.")
    modules: list[ModuleType] = [dreamerv3, *(importlib.import_module(module.name) for module in found)]
    for name, size in SIZES.items():

        def table(model_size: str, override: int | None = None, size: int = size) -> int:
            del model_size
            return size if override is None else override

        for module in modules:
            if hasattr(module, name):
                setattr(module, name, table)


def make_learner(case: str) -> dreamerv3.dreamerv3.DreamerV3Learner:
    """The learner alone, in this process, without a cluster."""
    if case == "image":
        obs: gym.Space = gym.spaces.Box(-1, 1, (load.SIDE, load.SIDE, 3), np.float32)
        action: gym.Space = gym.spaces.Discrete(load.ACTION)
    else:
        obs = gym.spaces.Box(-np.inf, np.inf, (load.VECTOR,), np.float32)
        action = gym.spaces.Box(-1, 1, (load.ACTION,), np.float32)
    config = (
        dreamerv3.DreamerV3Config()
        .framework("torch")
        .environment(observation_space=obs, action_space=action)
        .training(
            model_size="XS",
            batch_size_B=load.BATCH,
            batch_length_T=load.LENGTH,
            horizon_H=load.HORIZON,
            training_ratio=32,
        )
        .learners(num_learners=0, num_gpus_per_learner=0)
    )
    spaces = (obs, action)
    learner = config.build_learner(
        spaces={MODULE: spaces, "__env__": spaces, "__env_single__": spaces},
    )
    learner.build()
    return learner


def batch(case: str) -> SampleBatch:
    """The made-up rows under RLlib's names."""
    rows = load.made_up(case)
    obs = rows["obs"].astype(np.float32) / 128 - 1 if case == "image" else rows["obs"]
    columns = {
        "obs": obs,
        "actions": rows["action"],
        "rewards": rows["reward"],
        "is_first": rows["is_first"].astype(np.float32),
        "is_last": rows["is_last"].astype(np.float32),
        "is_terminated": rows["is_last"].astype(np.float32),
    }
    return SampleBatch({name: torch.as_tensor(value) for name, value in columns.items()})


def main() -> None:
    options = load.arguments()
    warnings.simplefilter("ignore")
    resize()
    learner, rows = make_learner(options.case), batch(options.case)
    module = learner.module[MODULE]

    def update() -> float:
        data = MultiAgentBatch({MODULE: SampleBatch(dict(rows))}, env_steps=load.BATCH * load.LENGTH)
        results = learner.update(training_data=TrainingData(batch=data))
        return float(results[MODULE]["WORLD_MODEL_L_total"])

    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    load.time_updates("rllib", options.case, update, count, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
