"""A DreamerV3 state through the checkpoint files and back."""

import numpy as np
import torch

from learner.catalog import make_agent, make_config
from learner.checkpoint import CheckpointStore
from system.specs import ActionSpec, ArraySpec, EnvSpec

ENV = EnvSpec(
    name="toy",
    obs={"vector": ArraySpec(shape=(3,), dtype="float32")},
    action=ActionSpec(kind="discrete", classes=(2,)),
)


def agent(seed):
    settings = {"size": "nano", "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "units": 8, "bins": 15}
    return make_agent("dreamer", make_config("dreamer", settings), ENV, device="cpu", seed=seed)


def test_state_survives_the_files_exactly(tmp_path):
    first, second = agent(1), agent(2)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(7, {"agent": first.state()}, {})
    loaded = store.newest()
    assert loaded is not None
    second.load(loaded.state["agent"])
    assert torch.equal(first.parameters.values, second.parameters.values)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
    np.testing.assert_array_equal(first.state()["returns"], second.state()["returns"])


def test_state_saved_on_another_kind_of_device_loads_with_a_new_random_stream():
    state = agent(1).state() | {"rng": np.arange(16, dtype=np.uint8)}  # a CUDA generator's state is 16 bytes
    first, second = agent(2), agent(3)
    first.load(state)
    second.load(state)
    np.testing.assert_array_equal(first.parameters.values, second.parameters.values)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
