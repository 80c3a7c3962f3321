"""Convolutions: the low-resolution form of repeat-and-convolve, image groups, chunks."""

import pytest
import torch
import torch.nn.functional as F

from learner.nn.decoder import UpConv
from learner.nn.encoder import CHUNK, Encoder, split_obs
from learner.nn.layers import initialise
from system.errors import SchemaError
from system.specs import ArraySpec


def image(height, width, channels=3):
    return ArraySpec(shape=(height, width, channels), dtype="uint8", kind="image")


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_low_resolution_form_equals_repeating_pixels_and_convolving(kernel):
    layer = UpConv(3, 2, kernel)
    generator = torch.Generator().manual_seed(0)
    initialise(layer, generator)
    layer.conv.bias.data.normal_(generator=generator)
    x = torch.randn(2, 3, 5, 4, generator=generator)
    grad = torch.randn(2, 2, 10, 8, generator=generator)
    results = []
    for plain in (True, False):
        leaf = x.clone().requires_grad_()
        doubled = F.interpolate(leaf, scale_factor=2, mode="nearest")
        out = layer.conv(doubled) if plain else layer(leaf)
        layer.zero_grad()
        out.backward(grad)
        results.append((out, leaf.grad, layer.conv.weight.grad.clone(), layer.conv.bias.grad.clone()))
    for plain, folded in zip(*results, strict=True):
        assert torch.allclose(plain, folded, atol=1e-4)


def test_images_share_a_cnn_by_resolution_and_small_grids_are_vectors():
    obs = {
        "b": image(64, 64),
        "a": image(64, 64, 1),
        "wide": image(84, 160),
        "grid": image(7, 7),
        "door": ArraySpec(shape=(1,), dtype="int32", kind="discrete", classes=4),
    }
    vectors, groups = split_obs(obs, 4)
    assert list(vectors) == ["door", "grid"]
    assert [(g.keys, g.levels, g.grid, g.padded) for g in groups] == [
        (("a", "b"), 4, (4, 4), (64, 64)),
        (("wide",), 4, (6, 10), (96, 160)),
    ]


@pytest.mark.parametrize(
    ("side", "levels", "grid"), [(16, 2, 4), (24, 3, 3), (32, 3, 4), (47, 4, 3), (256, 4, 16)]
)
def test_small_images_are_halved_less_often(side, levels, grid):
    _, (group,) = split_obs({"image": image(side, side)}, 4)
    assert (group.levels, group.grid) == (levels, (grid, grid))


def test_huge_images_are_refused_with_the_remedy():
    with pytest.raises(SchemaError, match="resize it in the environment adapter"):
        split_obs({"image": image(300, 64)}, 4)


def test_chunks_do_not_change_the_tokens():
    encoder = Encoder({"image": image(16, 16)}, units=8, layers=1, depth=2, mults=(1, 2), kernel=3)
    initialise(encoder, torch.Generator().manual_seed(0))
    pixels = torch.randint(0, 256, (2 * CHUNK + 3, 16, 16, 3), dtype=torch.uint8)
    whole = encoder({"image": pixels})
    parts = torch.cat([encoder({"image": part}) for part in pixels.split(10)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert encoder({"image": pixels.unflatten(0, (1, -1))}).shape == (1, 2 * CHUNK + 3, encoder.outputs)
