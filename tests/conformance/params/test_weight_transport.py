"""What every weight transport must do; run against the in-memory twin and the real gRPC server."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from system.errors import RejectedError
from system.params.client import GrpcWeightSink, GrpcWeightSource
from system.params.memory import MemoryWeights
from system.params.server import ParameterServer
from system.weights import NO_VERSION, PolicyVersion, Weights

Transport = tuple[Any, Any]
TIMEOUT = 20.0


@pytest.fixture(params=["memory", "grpc"])
def transport(request):
    """A (sink, source) pair over one store that keeps two versions."""
    if request.param == "memory":
        store = MemoryWeights(keep=2)
        yield store, store
        return
    server = ParameterServer("127.0.0.1:0", keep=2)
    sink, source = GrpcWeightSink(server.address), GrpcWeightSource(server.address)
    yield sink, source
    sink.close()
    source.close()
    server.stop()


def some_weights(counter: int, epoch: int = 1, size: int = 1000) -> Weights:
    rng = np.random.default_rng(counter)
    arrays = {
        "actor/out.bias": rng.normal(size=()).astype(np.float32),
        "encoder.0.weight": rng.normal(size=(size, 3)).astype(np.float32),
        "half": rng.normal(size=7).astype(np.float16),
        "codes": rng.integers(0, 9, size=(3, 2), dtype=np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "mask": rng.random(5) < 0.5,
    }
    return Weights.of(PolicyVersion(epoch, counter), arrays)


def test_what_was_published_arrives_bit_for_bit(transport: Transport):
    sink, source = transport
    sent = some_weights(1, size=300_000)  # 3.6 MB: several frames, the last one short
    sink.publish(sent)
    got = source.latest(NO_VERSION, TIMEOUT)
    assert got.version == sent.version
    assert got.digest == sent.digest
    assert got.arrays.keys() == sent.arrays.keys()
    for name, array in sent.arrays.items():
        assert got.arrays[name].dtype == array.dtype
        assert got.arrays[name].shape == array.shape
        assert got.arrays[name].tobytes() == array.tobytes()


def test_nothing_comes_while_nothing_is_newer(transport: Transport):
    sink, source = transport
    assert source.latest(NO_VERSION, TIMEOUT) is None
    assert source.newest(TIMEOUT) == NO_VERSION
    sink.publish(some_weights(3))
    assert source.latest(PolicyVersion(1, 3), TIMEOUT) is None
    assert source.latest(PolicyVersion(2, 0), TIMEOUT) is None
    assert source.latest(PolicyVersion(1, 2), TIMEOUT).version == (1, 3)
    assert source.newest(TIMEOUT) == sink.newest(TIMEOUT) == (1, 3)


@pytest.mark.parametrize(("epoch", "counter"), [(2, 5), (2, 4), (1, 9)])
def test_an_older_or_equal_version_is_refused(transport: Transport, epoch: int, counter: int):
    sink, source = transport
    sink.publish(some_weights(5, epoch=2))
    with pytest.raises(RejectedError, match="newer than") as refusal:
        sink.publish(some_weights(counter, epoch=epoch))
    assert refusal.value.reason == "version"
    assert source.newest(TIMEOUT) == (2, 5)


def test_a_new_epoch_is_newer_than_any_counter(transport: Transport):
    sink, source = transport
    sink.publish(some_weights(500))
    sink.publish(some_weights(1, epoch=2))
    assert source.latest(PolicyVersion(1, 500), TIMEOUT).version == (2, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_non_finite_weights_are_refused(transport: Transport, bad: float, dtype: type):
    sink, source = transport
    array = np.ones((10, 10), dtype)
    array[7, 3] = bad
    with pytest.raises(RejectedError, match="NaN or infinity") as refusal:
        sink.publish(Weights.of(PolicyVersion(1, 1), {"fine": np.ones(3), "bad": array}))
    assert refusal.value.reason == "nonfinite"
    assert source.latest(NO_VERSION, TIMEOUT) is None


def test_a_wrong_digest_is_refused(transport: Transport):
    sink, source = transport
    good = some_weights(1)
    lying = Weights(version=good.version, arrays=good.arrays, digest="0" * 64)
    with pytest.raises(RejectedError, match="digest") as refusal:
        sink.publish(lying)
    assert refusal.value.reason == "digest"
    assert source.latest(NO_VERSION, TIMEOUT) is None


def test_published_weights_do_not_follow_later_changes(transport: Transport):
    sink, source = transport
    array = np.zeros(10, np.float32)
    sink.publish(Weights.of(PolicyVersion(1, 1), {"w": array}))
    array += 1
    got = source.latest(NO_VERSION, TIMEOUT)
    np.testing.assert_array_equal(got.arrays["w"], 0)
    with pytest.raises(ValueError, match="read-only"):
        got.arrays["w"][0] = 1


def test_only_the_newest_versions_are_kept(transport: Transport):
    sink, source = transport
    for counter in (1, 2, 3):
        sink.publish(some_weights(counter))
    assert source.exactly(PolicyVersion(1, 2), TIMEOUT).digest == some_weights(2).digest
    assert source.exactly(PolicyVersion(1, 3), TIMEOUT).version == (1, 3)
    with pytest.raises(RejectedError, match=r"\(1, 1\) must be one of") as refusal:
        source.exactly(PolicyVersion(1, 1), TIMEOUT)
    assert refusal.value.reason == "unknown"


def test_readers_never_see_a_mix_of_versions(transport: Transport, concurrently: Callable[..., Any]):
    sink, source = transport

    def publish() -> None:
        for counter in range(1, 31):
            sink.publish(Weights.of(PolicyVersion(1, counter), {k: np.full(80_000, counter) for k in "abc"}))

    def pull() -> list[int]:
        seen = NO_VERSION
        counters = []
        while seen.counter < 30:
            weights = source.latest(seen, TIMEOUT)
            if weights is None:
                continue
            seen = weights.verify().version
            counters.append(seen.counter)
            assert {int(v) for a in weights.arrays.values() for v in np.unique(a)} == {seen.counter}
        return counters

    _, *pulled = concurrently(publish, pull, pull)
    for counters in pulled:
        assert counters == sorted(set(counters))
        assert counters[-1] == 30
