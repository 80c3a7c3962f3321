"""The compiled copy and the numpy copy move the same bytes and touch nothing else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import native, rows
from replay.rows import MemoryHome, RowViews, copy_rows_by_numpy

SHAPES = {
    "flag": ((), np.bool_),
    "vector": ((3,), np.float32),
    "odd": ((7, 11, 3), np.uint8),  # rows that end anywhere in a cache line
    "image": ((64, 64, 3), np.uint8),
}


def arrays(count: int, offset: int, seed: int) -> dict[str, np.ndarray]:
    """Columns [count, ...] of noise that begin `offset` items into their memory."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (shape, dtype) in SHAPES.items():
        items = count * int(np.prod(shape, dtype=np.int64))
        memory = rng.integers(0, 256, (items + offset) * np.dtype(dtype).itemsize, np.uint8)
        if dtype is np.bool_:
            memory &= 1
        made[name] = memory.view(dtype)[offset:].reshape(count, *shape)
    return made


@pytest.fixture
def no_library() -> Iterator[None]:
    """load_gather forgets what it found, before and after."""
    native.load_gather.cache_clear()
    yield
    native.load_gather.cache_clear()


@given(
    offsets=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    count=st.integers(0, 40),  # 40 images are 480 KiB: beyond what is streamed, with every kind of remainder
    at=st.integers(0, 5),
    first=st.integers(0, 5),
)
def test_compiled_and_numpy_copies_are_equal(
    offsets: tuple[int, int], count: int, at: int, first: int
) -> None:
    if native.load_gather() is None:
        pytest.skip("no C compiler")
    source = RowViews(arrays(45, offsets[0], seed=1))
    one, other = arrays(45, offsets[1], seed=2), arrays(45, offsets[1], seed=2)
    rows.copy_rows(RowViews(one), at, source, first, count)
    copy_rows_by_numpy(RowViews(other), at, source, first, count)
    for name in SHAPES:
        assert one[name].tobytes() == other[name].tobytes(), name


def test_rows_are_copied_without_a_compiler(
    no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.load_gather() is None
    source, target = arrays(9, 0, seed=1), arrays(9, 0, seed=2)
    MemoryHome(source).copy_rows(RowViews(target), 2, 1, 6)
    for name in SHAPES:
        np.testing.assert_array_equal(target[name][2:8], source[name][1:7])


def test_a_compiler_that_fails_leaves_nothing_behind(
    no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("false", "true", "'unbalanced"):  # "true" leaves an empty library
        native.load_gather.cache_clear()
        monkeypatch.setenv("CC", compiler)
        assert native.load_gather() is None
        assert list((tmp_path / "dreamfleet").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_library_is_built_anew(
    damage: bytes | None, no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -O1")
    assert native.load_gather() is not None
    (path,) = (tmp_path / "dreamfleet").iterdir()
    sound = path.read_bytes()
    path.unlink()  # it is mapped: other bytes need another file
    path.write_bytes(sound[: len(sound) // 2] if damage is None else damage)
    native.load_gather.cache_clear()
    assert native.load_gather() is not None
    assert [p.read_bytes() for p in (tmp_path / "dreamfleet").iterdir()] == [sound]
    with monkeypatch.context() as patched:
        patched.setattr(native, "_build", None)  # what is sound is not built again
        native.load_gather.cache_clear()
        assert native.load_gather() is not None


def test_a_library_that_others_could_have_written_is_not_loaded(
    no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dreamfleet").mkdir()
    (tmp_path / "dreamfleet").chmod(0o777)
    assert native.load_gather() is None


@pytest.mark.parametrize("compiled", [True, False])
def test_copies_beyond_the_rows_are_refused(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(rows, "load_gather", lambda: None)
    source, target = RowViews(arrays(9, 0, seed=1)), RowViews(arrays(9, 0, seed=2))
    for at, first, count in ((0, 4, 6), (0, -1, 2)):
        with pytest.raises(rows.RowsGone, match="within the 9"):
            rows.copy_rows(target, at, source, first, count)
    for at, first, count in ((4, 0, 6), (-1, 0, 2)):
        with pytest.raises(ValueError, match="within the 9"):
            rows.copy_rows(target, at, source, first, count)


@pytest.mark.parametrize("compiled", [True, False])
def test_columns_of_equal_sizes_in_another_order_are_not_copied(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(rows, "load_gather", lambda: None)
    reward, step = np.ones(4, np.float32), np.arange(4, dtype=np.int32)
    source, target = RowViews({"step": step, "reward": reward}), RowViews({"reward": reward, "step": step})
    with pytest.raises(AssertionError, match="reward"):
        rows.copy_rows(target, 0, source, 0, 4)
