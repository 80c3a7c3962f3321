"""Policies in folders: they act as the policy they came from, and nothing damaged or foreign gets in."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.catalog import make_config, make_policy
from learner.export import PROGRAM, SPEC, WEIGHTS, _digest, export_policy, load_policy
from learner.program import check_program
from system.errors import ConfigError, IntegrityError, SchemaError
from system.experience import Step
from system.specs import ActionSpec, ArraySpec, EnvSpec
from system.weights import PolicyVersion, Weights

SETTINGS = {"size": "nano", "deter": 32, "hidden": 8, "stoch": 4, "classes": 5, "units": 16, "bins": 15}
ENV = EnvSpec(
    name="toy",
    obs={
        "image": ArraySpec(shape=(16, 16, 3), dtype="uint8", kind="image"),
        "kind": ArraySpec(shape=(), dtype="int32", kind="discrete", classes=3),
        "vector": ArraySpec(shape=(3,), dtype="float32"),
    },
    action=ActionSpec(kind="discrete", classes=(3, 2)),
)


def weights(settings=SETTINGS, env=ENV, seed=5):
    policy = make_policy("dreamer", make_config("dreamer", settings), env, seed=seed, threads=0)
    arrays = {name: p.numpy() for name, p in policy.plain.named_parameters()}
    return Weights.of(PolicyVersion(2, 7), arrays)


def write(out, *, program=False, env=ENV, of=None):
    return export_policy(
        out,
        family="dreamer",
        settings=SETTINGS,
        env=env,
        weights=of or weights(env=env),
        source={"run": "toy", "updates": 3},
        program=program,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A policy with its program. Tests copy it before they break it."""
    return write(tmp_path_factory.mktemp("exported") / "policy", program=True)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "policy")


def observations(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, size=(rows, 16, 16, 3)).astype(np.uint8),
        "kind": rng.integers(0, 3, size=rows).astype(np.int32),
        "vector": rng.normal(size=(rows, 3)).astype(np.float32),
    }


def step_of(obs, first):
    rows = len(obs["vector"])
    never = np.zeros(rows, bool)
    return Step(
        env_id=np.arange(rows, dtype=np.int32),
        obs=obs,
        reward=np.zeros(rows, np.float32),
        is_first=np.full(rows, first),
        is_last=never,
        is_terminal=never,
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_loaded_policy_acts_as_the_one_it_came_from(exported, mode):
    loaded = load_policy(exported, seed=4, threads=0)
    original = make_policy("dreamer", make_config("dreamer", SETTINGS), ENV, seed=4, threads=0)
    original.load(weights())
    ours, theirs = loaded.initial(6), original.initial(6)
    for t in range(4):
        obs = observations(6, t)
        expected, theirs, _ = original.act(theirs, step_of(obs, t == 0), mode)
        np.testing.assert_array_equal(loaded.act(ours, obs, is_first=t == 0, mode=mode), expected)
    assert loaded.spec.version == PolicyVersion(2, 7)
    assert loaded.spec.env == ENV
    assert loaded.spec.source == {"run": "toy", "updates": 3}


@pytest.mark.parametrize(("rows", "greedy"), [(1, True), (5, False)])
def test_program_takes_the_steps_of_the_policy(exported, rows, greedy):
    """For other numbers of rows than it was traced with, over several steps, from the same random numbers."""
    policy = load_policy(exported, seed=9, threads=0).policy
    program = torch.export.load(exported / PROGRAM).module()
    generator = torch.Generator().set_state(policy.generator.get_state())
    carry = policy.initial(rows)
    deter, stoch, action = (torch.zeros_like(x) for x in (carry.deter, carry.stoch, carry.action))
    for t in range(3):
        obs = observations(rows, t)
        chosen, carry, _ = policy.act(carry, step_of(obs, t == 0), "eval" if greedy else "train")
        uniform = torch.rand((rows, 4), generator=generator)
        noise = torch.zeros(rows, 2) if greedy else torch.rand((rows, 2), generator=generator)
        action, deter, stoch = program(
            deter=deter,
            stoch=stoch.reshape(rows, -1),
            action=action,
            obs={key: torch.from_numpy(value) for key, value in obs.items()},
            is_first=torch.full((rows,), t == 0),
            uniform=uniform,
            noise=noise,
            greedy=torch.full((rows,), greedy),
        )
        decoded = torch.stack([part.argmax(-1) for part in action.split((3, 2), -1)], -1)
        np.testing.assert_array_equal(decoded.numpy(), chosen)
        torch.testing.assert_close(deter, carry.deter, atol=1e-5, rtol=1e-4)
        assert torch.equal(stoch.flatten(1), carry.stoch)


def test_program_holds_no_pickle_and_no_path_of_this_machine(exported):
    with zipfile.ZipFile(exported / PROGRAM) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = [name for name, data in parts.items() if data[:1] == b"\x80" or data[:4] == b"PK\x03\x04"]
    assert not [name for name in pickled if "/weights/weight_" not in name]
    configs = [json.loads(data)["config"] for name, data in parts.items() if name.endswith("_config.json")]
    entries = [entry for config in configs for entry in config.values()]
    assert len(entries) > 20
    assert not any(entry["use_pickle"] for entry in entries)
    assert not [data for name, data in parts.items() if name.endswith(".pt") and data]
    assert not [name for name, data in parts.items() if b".py" in data and name.endswith(".json")]


def test_same_weights_give_the_same_bytes(exported, tmp_path):
    again = write(tmp_path / "again", program=True)
    assert sorted(p.name for p in again.iterdir()) == sorted([SPEC, WEIGHTS, PROGRAM])
    for path in again.iterdir():
        assert path.read_bytes() == (exported / path.name).read_bytes(), path.name


AGAIN = """
import sys
from pathlib import Path

from learner.export import load_policy, export_policy
from system.weights import Weights

first, second = map(Path, sys.argv[1:])
loaded = load_policy(first)
arrays = {name: p.numpy() for name, p in loaded.policy.plain.named_parameters()}
spec = loaded.spec
export_policy(
    second,
    family=spec.family,
    settings=spec.settings,
    env=spec.env,
    weights=Weights.of(spec.version, arrays),
    source=spec.source,
)
"""


@pytest.mark.drill
def test_another_process_writes_the_same_bytes_from_what_it_loaded(exported, tmp_path):
    root = Path(__file__).resolve().parents[3]
    again = tmp_path / "again"
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(exported), str(again)],
        cwd=root,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        timeout=120,
    )
    for path in again.iterdir():
        assert path.read_bytes() == (exported / path.name).read_bytes(), path.name


def test_weights_and_specification_are_enough(folder):
    (folder / PROGRAM).write_bytes(b"not a program")
    load_policy(folder, threads=0)
    (folder / PROGRAM).unlink()
    assert load_policy(folder, threads=0).act(load_policy(folder).initial(2), observations(2)).shape == (2, 2)


def test_every_damage_is_refused_by_the_name_of_the_file(folder):
    rng = np.random.default_rng(0)
    for name in (SPEC, WEIGHTS):
        whole = (folder / name).read_bytes()
        damages = [whole[:-1], whole + b" x", b"", b"[]", bytes(100)]
        for at in rng.integers(0, len(whole), size=12):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            damages.append(bytes(flipped))
        for damage in damages:
            (folder / name).write_bytes(damage)
            if name == SPEC and _same_json(damage, whole):
                continue
            with pytest.raises(IntegrityError, match=name):
                load_policy(folder, threads=0)
        (folder / name).write_bytes(whole)
    (folder / WEIGHTS).unlink()
    with pytest.raises(IntegrityError, match=WEIGHTS):
        load_policy(folder, threads=0)


def _same_json(damage, whole):
    try:
        return json.loads(damage) == json.loads(whole)
    except ValueError:
        return False


def forger(folder):
    """(policy.json without its digest, what writes it with changes and the digest that then is right)."""
    body = json.loads((folder / SPEC).read_text())
    body.pop("digest")

    def rewritten(**changes):
        changed = body | changes
        (folder / SPEC).write_text(json.dumps(changed | {"digest": _digest(changed)}))

    return body, rewritten


@pytest.mark.parametrize(
    "forged",
    [{"units": 10**9}, {"deter": 2**40}, {"deter": 2**62}, {"deter": 10**30 * 8}, {"stoch": 10**12},
     {"size": "size400m", "deter": 2**40}],
)  # fmt: skip
def test_forged_sizes_are_refused_before_memory_is_asked_for(folder, forged):
    body, rewritten = forger(folder)
    rewritten(settings=body["settings"] | forged)
    with pytest.raises((SchemaError, IntegrityError), match=SPEC):
        load_policy(folder, threads=0)


@pytest.mark.parametrize("name", ["actor_layers", "encoder_layers"])
def test_forged_depths_are_refused_before_memory_is_asked_for(folder, name):
    body, rewritten = forger(folder)
    rewritten(settings=body["settings"] | {name: 2**62})
    with pytest.raises(ConfigError, match=name):
        load_policy(folder, threads=0)


@pytest.mark.parametrize(
    "forged",
    [{"shape": []}, {"shape": [10**9, 16, 3]}, {"kind": "vector", "shape": [10**12]}, {"shape": [16, -16, 3]},
     {"kind": "discrete", "classes": 2**40}],
)  # fmt: skip
def test_forged_observations_are_refused_before_memory_is_asked_for(folder, forged):
    body, rewritten = forger(folder)
    image = body["env"]["obs"]["image"] | forged
    rewritten(env=body["env"] | {"obs": body["env"]["obs"] | {"image": image}})
    with pytest.raises((SchemaError, IntegrityError)):
        load_policy(folder, threads=0)


def test_specification_that_was_changed_with_its_digest_is_still_checked(folder):
    body, rewritten = forger(folder)
    rewritten(format=2)
    with pytest.raises(ConfigError, match="format 2"):
        load_policy(folder)
    rewritten(env={"name": "toy"})
    with pytest.raises(IntegrityError, match=SPEC):
        load_policy(folder)
    rewritten(weights_digest="0" * 64)
    with pytest.raises(IntegrityError, match="digest"):
        load_policy(folder)
    rewritten(settings=body["settings"] | {"units": 24})
    with pytest.raises(SchemaError, match="belong to another model"):
        load_policy(folder)


def test_what_is_no_policy_is_refused_with_the_command_that_makes_one(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="dreamfleet export"):
            load_policy(path)
    (tmp_path / SPEC).write_text('{"kind": "something else"}')
    with pytest.raises(IntegrityError, match="dreamfleet-policy"):
        load_policy(tmp_path)


def test_observations_of_another_kind_are_refused(exported):
    policy = load_policy(exported, threads=0)
    carry = policy.initial(2)
    with pytest.raises(SchemaError, match="keys"):
        policy.act(carry, {"vector": np.zeros((2, 3), np.float32)})
    for change in ({"vector": np.zeros((2, 3))}, {"vector": np.zeros((2, 4), np.float32)}):
        with pytest.raises(SchemaError, match=r"'vector'.* must be float32"):
            policy.act(carry, observations(2) | change)
    for wrong in (
        observations(2) | {"vector": np.zeros((1, 3), np.float32)},
        observations(3),
        observations(1),
    ):
        with pytest.raises(SchemaError, match="rows, this carry remembers 2 environments"):
            policy.act(carry, wrong)


def test_first_rows_and_modes_that_are_none_are_refused(exported):
    policy = load_policy(exported, threads=0)
    carry = policy.initial(2)
    with pytest.raises(SchemaError, match=r"is_first has shape \(3,\), must be one bool or \(2,\)"):
        policy.act(carry, observations(2), is_first=np.ones(3, bool))
    with pytest.raises(SchemaError, match="'greedy' must be eval"):
        policy.act(carry, observations(2), mode="greedy")
    assert policy.act(carry, observations(2), is_first=[True, False]).shape == (2, 2)


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    broken = weights()
    name = next(iter(broken.arrays))
    arrays = dict(broken.arrays) | {name: np.full_like(broken.arrays[name], np.nan)}
    with pytest.raises(ConfigError, match="not finite"):
        write(tmp_path / "policy", of=Weights.of(PolicyVersion(1, 1), arrays))
    with pytest.raises(SchemaError, match="belong to another model"):
        write(tmp_path / "policy", of=weights(SETTINGS | {"units": 24}))
    assert not list(tmp_path.iterdir())
    write(tmp_path / "policy")
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path / "policy")


def test_program_of_other_weights_does_not_pass_the_check_of_export(exported):
    made = torch.export.load(exported / PROGRAM)
    right, wrong = (make_policy("dreamer", make_config("dreamer", SETTINGS), ENV, seed=0) for _ in range(2))
    right.load(weights())
    check_program(made, right)
    with pytest.raises(AssertionError, match="not close"):
        check_program(made, wrong)
