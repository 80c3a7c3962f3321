import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from system.errors import RejectedError
from system.params.frames import from_frames, to_frames
from system.params.weights_pb2 import Frame
from system.weights import NO_VERSION, PolicyVersion, Weights
from system.wire import FRAME_BYTES

WEIGHTS = Weights.of(
    PolicyVersion(1, 7),
    {
        "a": np.arange(700_000, dtype=np.float32),
        "b": np.ones((3, 5), np.float16),
        "c": np.zeros((0, 2), np.int32),
    },
)
FRAMES = list(to_frames(WEIGHTS))


def rebuild(
    frames: list[Frame], limit_bytes: int = 1 << 30, newer_than: PolicyVersion = NO_VERSION
) -> Weights | None:
    return from_frames(frames, limit_bytes=limit_bytes, newer_than=newer_than)


def with_header(change: Callable[[dict[str, Any]], Any]) -> list[Frame]:
    """The frames of WEIGHTS with an edited header; `change` edits in place or returns a new body."""
    body = json.loads(FRAMES[0].header)
    body = change(body) or body
    return [Frame(header=json.dumps(body).encode()), *FRAMES[1:]]


array_dtypes = st.sampled_from(["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"])


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,20}", fullmatch=True),
        array_dtypes.flatmap(
            lambda d: hnp.arrays(
                d,
                hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
                elements={"allow_nan": False, "allow_infinity": False} if d.startswith("f") else None,
            )
        ),
        max_size=5,
    )
)
def test_any_arrays_survive_the_round_trip(arrays: dict[str, np.ndarray]):
    sent = Weights.of(PolicyVersion(1, 1), arrays)
    got = rebuild(list(to_frames(sent)))
    assert got is not None
    assert got.verify().digest == sent.digest


def test_strided_arrays_travel_by_value():
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    got = rebuild(list(to_frames(Weights.of(PolicyVersion(1, 1), {"t": base.T, "s": base[:, ::2]}))))
    np.testing.assert_array_equal(got.arrays["t"], base.T)
    np.testing.assert_array_equal(got.arrays["s"], base[:, ::2])


def test_frames_are_full_except_the_last():
    sizes = [len(frame.data) for frame in FRAMES[1:]]
    assert set(sizes[:-1]) == {FRAME_BYTES}
    assert 0 < sizes[-1] <= FRAME_BYTES


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 300, "/abs"])
def test_a_name_that_cannot_travel_is_refused_before_sending(name: str):
    with pytest.raises(RejectedError, match="must match"):
        to_frames(Weights.of(PolicyVersion(1, 1), {name: np.zeros(1)}))


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]"])
def test_a_dtype_that_cannot_travel_is_refused_before_sending(dtype: str):
    array = np.zeros(1, dtype)
    with pytest.raises(RejectedError, match="cannot travel"):
        to_frames(Weights(version=PolicyVersion(1, 1), arrays={"a": array}, digest="0" * 64))


def test_a_whole_number_written_as_a_float_is_the_same_number():
    assert rebuild(with_header(lambda b: b.update(nbytes=float(b["nbytes"])))) is not None


def test_a_stream_without_frames_means_nothing_newer():
    assert rebuild([]) is None


@pytest.mark.parametrize("cut", range(1, len(FRAMES)))
def test_a_stream_cut_between_frames_is_refused(cut: int):
    with pytest.raises(RejectedError) as refusal:
        rebuild(FRAMES[:cut])
    assert refusal.value.reason == "truncated"


def test_an_extra_frame_is_refused():
    with pytest.raises(RejectedError) as refusal:
        rebuild([*FRAMES, Frame(data=b"x")])
    assert refusal.value.reason == "oversize"


@pytest.mark.parametrize(
    "frame", [Frame(data=b"short"), Frame(), FRAMES[0], Frame(data=bytes(FRAME_BYTES + 1))]
)
def test_a_frame_of_the_wrong_size_or_kind_is_refused(frame: Frame):
    with pytest.raises(RejectedError) as refusal:
        rebuild([FRAMES[0], frame, *FRAMES[1:]])
    assert refusal.value.reason == "frame"


def test_one_flipped_bit_is_refused():
    data = bytearray(FRAMES[1].data)
    data[12345] ^= 1
    with pytest.raises(RejectedError) as refusal:
        rebuild([FRAMES[0], Frame(data=bytes(data)), *FRAMES[2:]])
    assert refusal.value.reason == "digest"


def test_an_old_version_is_refused_before_its_bytes_are_read():
    def exploding():
        yield FRAMES[0]
        pytest.fail("read past the header")

    with pytest.raises(RejectedError) as refusal:
        from_frames(exploding(), limit_bytes=1 << 30, newer_than=PolicyVersion(1, 7))
    assert refusal.value.reason == "version"


def test_more_bytes_than_allowed_are_refused_before_they_are_read():
    with pytest.raises(RejectedError, match="must be <= 1000") as refusal:
        rebuild(FRAMES[:1], limit_bytes=1000)
    assert refusal.value.reason == "oversize"


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(version=[1]),
        lambda b: b.update(version=["1", 7]),
        lambda b: b.update(version=[True, 7]),
        lambda b: b.update(version=[1, -7]),
        lambda b: b.update(version=[0, 0]),
        lambda b: b.update(version=[1, 2**41]),
        lambda b: b.update(digest="xyz"),
        lambda b: b.update(digest=None),
        lambda b: b.update(nbytes=b["nbytes"] + 1),
        lambda b: b.update(nbytes=float(b["nbytes"] + 0.5)),
        lambda b: b.update(nbytes=2**70),
        lambda b: b.update(arrays=7),
        lambda b: b.update(arrays=[*b["arrays"], b["arrays"][0]]),
        lambda b: b.update(arrays=b["arrays"][::-1]),
        lambda b: b["arrays"][0].update(shape=[-1]),
        lambda b: b["arrays"][0].update(shape=[2.5]),
        lambda b: b["arrays"][0].update(shape=[2**62, 2**62]),
        lambda b: b["arrays"][2].update(shape=[0, 2**62]),
        lambda b: b["arrays"][0].update(shape=[1] * 40),
        lambda b: b["arrays"][0].update(dtype="object"),
        lambda b: b["arrays"][0].update(dtype="float128"),
        lambda b: b["arrays"][0].update(dtype=["float32"]),
        lambda b: b["arrays"][0].update(name="../a"),
        lambda b: b["arrays"][0].update(name=5),
        lambda b: b["arrays"][1].update(offset=0),
        lambda b: b["arrays"][1].update(offset=None),
        lambda b: b["arrays"].append("entry"),
        lambda b: [b],
        lambda b: "text",
    ],
)
def test_a_lying_header_is_refused(change: Callable[[dict[str, Any]], Any]):
    with pytest.raises(RejectedError) as refusal:
        rebuild(with_header(change))
    assert refusal.value.reason == "header"


@given(st.binary(max_size=200))
def test_a_garbage_header_is_refused(garbage: bytes):
    with pytest.raises(RejectedError) as refusal:
        rebuild([Frame(header=garbage), *FRAMES[1:]])
    assert refusal.value.reason == "header"


def test_a_deeply_nested_header_is_refused():
    with pytest.raises(RejectedError) as refusal:
        rebuild([Frame(header=b"[" * 100_000)])
    assert refusal.value.reason == "header"


@given(st.integers(0, len(FRAMES[0].header) - 1), st.integers(1, 255))
def test_no_single_changed_header_byte_yields_other_weights(position: int, flip: int):
    header = bytearray(FRAMES[0].header)
    header[position] ^= flip
    try:
        got = rebuild([Frame(header=bytes(header)), *FRAMES[1:]])
    except RejectedError:
        return
    assert got is not None  # the version is outside the digest: the server orders it, TLS protects it
    assert got.digest == WEIGHTS.digest
    assert got.verify().arrays.keys() == WEIGHTS.arrays.keys()
