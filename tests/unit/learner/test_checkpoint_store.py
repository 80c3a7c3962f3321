import hashlib
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from learner.checkpoint import CheckpointStore, _digest, check_signature
from learner.state_files import write_arrays
from learner.state_tree import join_state, split_state
from system.errors import ConfigError, IntegrityError
from tests.unit.learner.checkpoint_states import assert_equal, some_state

ROOT = Path(__file__).resolve().parents[3]
META = {"signature": {"family": "dreamer", "deter": 512}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def test_what_was_saved_comes_back(store: CheckpointStore):
    path = store.save(40, some_state(40), META)
    loaded = store.newest()
    assert (loaded.path, loaded.step, loaded.meta) == (path, 40, META)
    assert_equal(loaded.state, some_state(40))
    loaded.state["agent"]["weights"] += 1  # loaded arrays may be trained in place


def test_the_arrays_file_is_plain_safetensors(store: CheckpointStore):
    path = store.save(1, some_state(1), META)
    arrays = load_file(path / "arrays.safetensors")
    np.testing.assert_array_equal(arrays["agent/weights"], some_state(1)["agent"]["weights"])


def test_a_state_without_arrays_is_a_state(store: CheckpointStore):
    store.save(1, {"updates": 1}, {})
    assert store.newest().state == {"updates": 1}


def test_an_empty_store_has_nothing(store: CheckpointStore):
    assert store.newest() is None


def test_only_broken_checkpoints_are_an_error_not_a_fresh_start(store: CheckpointStore):
    assert store.newest_sound() is None
    for step in (1, 2):
        store.save(step, some_state(step), META)
    (store.paths()[-1] / "manifest.json").write_text("{")
    assert store.newest_sound().step == 1
    (store.paths()[0] / "arrays.safetensors").write_bytes(b"")
    assert store.newest() is None
    with pytest.raises(
        IntegrityError, match=r"none of the 2 checkpoints .*manifest\.json.*move checkpoints/"
    ):
        store.newest_sound()


def test_only_the_newest_are_kept_and_the_last_save_wins(store: CheckpointStore):
    for step in (
        10,
        20,
        30,
        25,
    ):  # a rollback repeats steps: the last save is the newest, not the greatest step
        store.save(step, some_state(step), META)
    assert [int(path.name.split("-")[1]) for path in store.paths()] == [20, 30, 25]
    assert store.newest().step == 25
    assert sorted(p.name for p in store.root.iterdir()) == sorted(p.name for p in store.paths())


def test_other_things_in_the_directory_are_left_alone(store: CheckpointStore):
    (store.root / "notes.txt").write_text("mine")
    (store.root / "backup-000001-10").mkdir()
    for step in range(5):
        store.save(step, some_state(step), META)
    assert (store.root / "notes.txt").exists()
    assert (store.root / "backup-000001-10").exists()
    assert store.newest().step == 4


FILES = ["arrays.safetensors", "state.json", "manifest.json"]


def damage_truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_delete(file: Path) -> None:
    file.unlink()


def damage_grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0" * 64)


def damage_garbage(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def damage_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def damage_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE = [
    damage_truncate,
    damage_empty,
    damage_delete,
    damage_grow,
    damage_garbage,
    damage_directory,
    damage_fifo,
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_skipped_and_left_in_place(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
):
    store.save(1, some_state(1), META)
    broken = store.save(2, some_state(2), META)
    damage(broken / name)
    with pytest.raises(IntegrityError, match=r"resume from an older checkpoint") as failure:
        store.load(broken)
    assert str(broken / name) in str(failure.value)
    with caplog.at_level(logging.WARNING):
        assert store.newest().step == 1
    assert [record.message for record in caplog.records] == ["checkpoint skipped"]
    assert broken.exists()


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_gets_through(store: CheckpointStore, name: str):
    path = store.save(2, some_state(2), META)
    file = path / name
    whole = file.read_bytes()
    rng = random.Random(7)
    for _ in range(150):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(IntegrityError):
            store.load(path)
    file.write_bytes(whole)
    assert_equal(store.load(path).state, some_state(2))


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest with `change` and a digest that fits, as a careful attacker would."""
    body = json.loads((path / "manifest.json").read_text())
    del body["digest"]
    change(body)
    (path / "manifest.json").write_text(json.dumps({**body, "digest": _digest(body)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["files"].update({"../../outside": b["files"]["state.json"]}),
        lambda b: b.update(files={"/etc/hostname": b["files"]["state.json"]}),
        lambda b: b["files"].pop("state.json"),
        lambda b: b["files"]["state.json"].update(size=-1),
        lambda b: b["files"]["state.json"].update(size="12"),
        lambda b: b["files"]["state.json"].pop("sha256"),
        lambda b: b.update(files=["state.json", "arrays.safetensors"]),
        lambda b: b.update(step="9"),
        lambda b: b.update(step=None),
        lambda b: b.update(format=2),
        lambda b: b.pop("meta"),
        lambda b: b.update(meta=[]),
    ],
)
def test_a_forged_manifest_is_refused(store: CheckpointStore, change: Callable[[dict[str, Any]], None]):
    path = store.save(1, some_state(1), META)
    forge(path, change)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        store.load(path)


def forge_file(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)
    about = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forge(path, lambda body: body["files"].update({name: about}))


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        safetensors({}, length=2**60),
        safetensors(b"\xff\xfe not json"),
        safetensors({"w": {**F32, "shape": [2**40]}}, bytes(16)),
        safetensors({"w": {**F32, "data_offsets": [0, 2**50]}}, bytes(16)),
        safetensors({"w": {**F32, "data_offsets": [16, 0]}}, bytes(16)),
        safetensors({"w": {**F32, "dtype": "OBJECT"}}, bytes(16)),
        safetensors({"w": F32}, bytes(8)),
        safetensors({"w": F32}, bytes(32)),
        safetensors({"w": F32, "v": F32}, bytes(16)),
        safetensors({"w": F32}, bytes(16)),  # well-formed, but the state refers to other names
    ],
)
def test_a_lying_arrays_header_is_refused_though_its_digest_fits(store: CheckpointStore, content: bytes):
    path = store.save(1, some_state(1), META)
    forge_file(path, "arrays.safetensors", content)
    with pytest.raises(IntegrityError, match=r"arrays\.safetensors|state\.json"):
        store.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"7", b"{", b'{"a": {"$array": "nowhere"}}', b'{"a": {"$float": "x"}}', b"[" * 99999],
)
def test_a_forged_state_is_refused(store: CheckpointStore, content: bytes):
    path = store.save(1, some_state(1), META)
    forge_file(path, "state.json", content)
    with pytest.raises(IntegrityError, match=r"state\.json"):
        store.load(path)


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, np.array([object()]), np.array(["text"]), 1j])
def test_a_value_that_cannot_be_stored_is_named_and_nothing_is_written(store: CheckpointStore, value: Any):
    with pytest.raises(ConfigError, match="agent/odd"):
        store.save(1, {"agent": {"odd": value}}, META)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("key", [1, None, "$array", "$float"])
def test_a_key_that_cannot_be_stored_is_named(store: CheckpointStore, key: Any):
    with pytest.raises(ConfigError, match="state key"):
        store.save(1, {"agent": {key: 1}}, META)


def test_keep_must_be_positive(tmp_path: Path):
    with pytest.raises(ConfigError, match="keep"):
        CheckpointStore(tmp_path, keep=0)


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(0, 9).map(np.arange)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text().filter(lambda k: k[:1] != "$"), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "a/b", "a/b'", "__metadata__"]), trees))
def test_splitting_and_joining_is_the_identity(state: dict[str, Any]):
    tree, arrays = split_state(state)
    assert_equal(join_state(json.loads(json.dumps(tree, allow_nan=False)), arrays), state)


def test_arrays_of_every_kind_survive_the_file(tmp_path: Path):
    dtypes = [
        "bool",
        *(f"{k}int{b}" for k in ("", "u") for b in (8, 16, 32, 64)),
        *(f"float{b}" for b in (16, 32, 64)),
    ]
    arrays = {f"{d}/{n}": np.arange(n).astype(d) for d in dtypes for n in (0, 1, 5)}
    arrays["big-endian"] = np.arange(5, dtype=">f4")
    write_arrays(tmp_path / "file", arrays)
    got = load_file(tmp_path / "file")
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)


def test_a_matching_signature_passes():
    check_signature({"family": "dreamer", "shape": (64, 64, 3)}, {"family": "dreamer", "shape": [64, 64, 3]})


def test_a_foreign_signature_is_refused_naming_every_difference():
    expected = {"family": "dreamer", "model": {"deter": 512, "units": 64}, "obs.image": [64, 64, 3]}
    found = {"family": "dreamer", "model": {"deter": 1024, "units": 64}, "obs.state": [4]}
    with pytest.raises(ConfigError) as refusal:
        check_signature(expected, found)
    text = str(refusal.value)
    assert "model.deter is 1024 in the checkpoint, must be 512" in text
    assert "obs.image is absent in the checkpoint" in text
    assert "obs.state is [4] in the checkpoint, must be absent" in text
    assert "family" not in text
    assert "units" not in text
