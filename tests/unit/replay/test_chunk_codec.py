"""Chunks come back as they went in, with or without the kept zstd context, and damage is always told."""

import numpy as np
import pytest

from replay import chunk_codec
from system.errors import IntegrityError


def chunk(noisy: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 256, 9000, dtype=np.uint8) if noisy else np.repeat(np.arange(90, dtype=np.uint8), 100)
    )


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "numcodecs"])
@pytest.mark.parametrize("codec", ["plain", "checked", "packed"])
def test_a_chunk_comes_back(codec: chunk_codec.Codec, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(chunk_codec._per_thread.context, "library", None)
    for noisy in (True, False):
        target = np.zeros(9000, np.uint8)
        chunk_codec.unpack(np.frombuffer(chunk_codec.pack(chunk(noisy), codec), np.uint8), codec, target)
        np.testing.assert_array_equal(target, chunk(noisy))


@pytest.mark.parametrize("codec", ["checked", "packed"])
def test_no_flipped_bit_and_no_cut_goes_unnoticed(codec: chunk_codec.Codec) -> None:
    stored = np.frombuffer(chunk_codec.pack(chunk(noisy=False), codec), np.uint8)
    target = np.zeros(9000, np.uint8)
    for at in range(0, len(stored), max(1, len(stored) // 60)):
        damaged = stored.copy()
        damaged[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError):
            chunk_codec.unpack(damaged, codec, target)
        with pytest.raises(IntegrityError):
            chunk_codec.unpack(stored[:at], codec, target)


@pytest.mark.parametrize("codec", ["plain", "checked", "packed"])
def test_a_chunk_of_another_size_is_refused(codec: chunk_codec.Codec) -> None:
    stored = np.frombuffer(chunk_codec.pack(chunk(noisy=False), codec), np.uint8)
    with pytest.raises(IntegrityError):
        chunk_codec.unpack(stored, codec, np.zeros(8999, np.uint8))


def test_the_trial_packs_what_shrinks_and_leaves_narrow_rows_alone() -> None:
    still = np.stack([chunk(noisy=False)] * 4)
    noise = np.stack([chunk(noisy=True)] * 4)
    assert chunk_codec.choose(still, 1000) == "packed"
    assert chunk_codec.choose(noise, 1000) == "checked"
    assert chunk_codec.choose(still, 256) == "plain"
    picked = chunk_codec.trial_chunks(np.arange(10, 100))
    assert (picked[0], picked[-1], len(picked)) == (10, 99, chunk_codec.TRIAL_CHUNKS)
    assert chunk_codec.trial_chunks(np.asarray([5, 6])).tolist() == [5, 6]
