"""Image encoder and decoder as trained on CPUs against plain layers: one batch, channels first, autograd.

Of both backends: torch with its gradients written out, and the compiled library.
"""

import pytest
import torch
import torch.nn.functional as F

from learner.backends import TORCH, choose_backend
from learner.native.library import absence, available
from learner.nn import vision
from learner.nn.decoder import Decoder
from learner.nn.encoder import Encoder
from learner.nn.layers import initialise
from learner.nn.vision import _pool, _pool_back, trainable
from system.specs import ArraySpec

TOLERANCE = 2e-5  # of the largest entry: sums are taken in another order
CHUNK, MANY = 4, 70  # images of a pass on the torch backend in these tests; of several parts in the library
SEED = 5  # no two largest of four pooled values closer than 1e-5: rounding must not choose between them
FEAT = {"deter": 16, "stoch": 8}


def image(height, width, channels):
    return ArraySpec(shape=(height, width, channels), dtype="uint8", kind="image")


CASES = {
    "as in size1m, more than one chunk": ({"image": image(64, 64, 3)}, (2, 3, 4, 4), 4, 5, CHUNK + 2),
    "odd sides": ({"image": image(47, 50, 3)}, (2, 3, 4, 4), 2, 5, 3),
    "keys that share a network": ({"a": image(33, 21, 1), "b": image(33, 21, 3)}, (1, 2, 3), 4, 3, 5),
    "two networks and a vector": (
        {"a": image(16, 16, 1), "b": image(24, 20, 2), "v": ArraySpec(shape=(3,), dtype="float32")},
        (2, 4),
        4,
        7,
        2,
    ),
    "more channels than lanes": ({"image": image(20, 20, 3)}, (3, 5), 8, 5, 3),
    "widths of size12m": ({"image": image(24, 24, 3)}, (2, 3, 4, 4), 16, 5, 2),
    "one level of an even number of parts": ({"image": image(16, 18, 1)}, (3,), 2, 1, 64),
}


@pytest.fixture(params=["torch", "native"])
def backend(request, monkeypatch):
    monkeypatch.setattr(vision, "CHUNK", CHUNK)
    if request.param == "torch":
        return TORCH
    if not available():
        pytest.skip(f"no compiled regions: {absence()}")
    return choose_backend("native", torch.device("cpu"), "fp32")


@pytest.fixture(params=CASES.values(), ids=CASES)
def nets(request, backend):
    obs, mults, depth, kernel, count = request.param
    cnn = {"units": 8, "layers": 1, "depth": depth, "mults": mults, "kernel": kernel}
    encoder, decoder = Encoder(obs, **cnn), Decoder(obs, **cnn, **FEAT, blocks=2)
    encoder.compute_by(backend.encode)
    decoder.compute_by(backend.reconstruct)
    generator = torch.Generator().manual_seed(SEED)
    for net in (encoder, decoder):
        initialise(net, generator)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    batch = {key: sample(spec, count, generator) for key, spec in obs.items()}
    return encoder, decoder, batch, torch.randn(count, 24, generator=generator, requires_grad=True)


def sample(spec, count, generator):
    if spec.kind == "image":
        return torch.randint(0, 256, (count, *spec.shape), dtype=torch.uint8, generator=generator)
    return torch.randn(count, *spec.shape, generator=generator)


def planes_norm(x, scale):
    """RMS norm over the channels of [N, C, H, W], then SiLU."""
    x = x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt()
    return F.silu(x * scale[:, None, None])


def plain_tokens(encoder, obs):
    parts = [encoder.mlp(torch.sign(obs["v"]) * torch.log1p(obs["v"].abs()))] if encoder.vectors else []
    for group, cnn in zip(encoder.images, encoder.cnn, strict=True):
        x = torch.cat([obs[key] for key in group.keys], -1).permute(0, 3, 1, 2).contiguous() / 255.0 - 0.5
        x = F.pad(x, (0, group.padded[1] - group.side[1], 0, group.padded[0] - group.side[0]))
        for conv, norm in zip(cnn.conv, cnn.norm, strict=True):
            x = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
            x = planes_norm(F.max_pool2d(x, 2), norm.scale)
        parts.append(x.permute(0, 2, 3, 1).flatten(1))
    return torch.cat(parts, -1)


def plain_losses(decoder, feat, obs):
    losses = {}
    if decoder.vectors:
        target = torch.sign(obs["v"]) * torch.log1p(obs["v"].abs())
        losses["v"] = (decoder.heads[0](decoder.mlp(feat)) - target).square().sum(1)
    for group, cnn in zip(decoder.images, decoder.cnn, strict=True):
        x = cnn._maps(feat).permute(0, 3, 1, 2)
        for conv, norm in zip(cnn.conv, [*cnn.norm, None], strict=True):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.conv2d(x, conv.conv.weight, conv.conv.bias, padding=conv.conv.weight.shape[-1] // 2)
            x = torch.sigmoid(x) if norm is None else planes_norm(x, norm.scale)
        pixels = x[:, :, : group.side[0], : group.side[1]].permute(0, 2, 3, 1)
        for key, part in zip(group.keys, pixels.split(group.channels, -1), strict=True):
            losses[key] = (part - obs[key] / 255.0).square().sum((1, 2, 3))
    return losses


def agree(ours, plain):
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= TOLERANCE * plain.abs().max()


def test_tokens_and_every_gradient_of_the_encoder_are_those_of_plain_layers(nets):
    encoder, _, obs, _ = nets
    ours, plain = encoder(obs), plain_tokens(encoder, obs)
    agree(ours, plain)
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(encoder.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters, weights) for x in (ours, plain)), strict=True):
        agree(a, b)


def test_losses_and_every_gradient_of_the_decoder_are_those_of_plain_layers(nets):
    _, decoder, obs, feat = nets
    ours, plain = decoder.reconstruction(feat, obs), plain_losses(decoder, feat, obs)
    assert list(ours) == list(plain)
    grads = []
    for losses in (ours, plain):
        rows = torch.stack([losses[key] for key in obs], 1)  # each image and key counts differently
        factors = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad((rows * factors).sum(), [feat, *decoder.parameters()]))
    for key in obs:
        agree(ours[key], plain[key])
    for a, b in zip(*grads, strict=True):
        agree(a, b)


def test_losses_are_those_of_the_predicted_pixels(nets):
    _, decoder, obs, feat = nets
    plain = decoder.losses(decoder(feat), obs, 1)
    for key, loss in decoder.reconstruction(feat, obs).items():
        agree(loss, plain[key])


def test_leading_axes_are_kept(nets):
    encoder, decoder, obs, feat = nets
    deeper = {key: value.unsqueeze(0) for key, value in obs.items()}
    agree(encoder(deeper), encoder(obs).unsqueeze(0))
    losses = decoder.reconstruction(feat, obs)
    for key, loss in decoder.reconstruction(feat.unsqueeze(0), deeper).items():
        agree(loss, losses[key].unsqueeze(0))


@pytest.mark.parametrize("value", [0, 255])
def test_pooled_ties_of_a_plain_picture_give_the_same_gradients(value, backend):
    encoder = Encoder({"i": image(32, 32, 3)}, units=8, layers=1, depth=16, mults=(1, 2), kernel=5)
    encoder.compute_by(backend.encode)
    initialise(encoder, torch.Generator().manual_seed(0))
    obs = {"i": torch.full((4, 32, 32, 3), value, dtype=torch.uint8)}
    grads = [
        torch.autograd.grad(tokens.square().sum(), list(encoder.parameters()))
        for tokens in (encoder(obs), plain_tokens(encoder, obs))
    ]
    for a, b in zip(*grads, strict=True):
        agree(a, b)


def test_equal_pooled_values_pass_their_gradient_to_the_first_of_them():
    y = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 2.0], [1.0, 2.0]]]).unsqueeze(-1)  # [N, H, W, O]
    pooled, taller = _pool(y)
    assert pooled.flatten().tolist() == [1.0, 2.0]
    grad = _pool_back(torch.tensor([3.0, 5.0]).view(2, 1, 1, 1), y, taller)
    assert grad.squeeze(-1).tolist() == [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 0.0]]]


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_mixed_precision_and_acting_take_the_plain_path(nets):
    encoder, decoder, obs, feat = nets
    with torch.no_grad():
        assert not trainable(feat)
    tokens, losses = encoder(obs), decoder.reconstruction(feat, obs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not trainable(feat)
        rough, loose = encoder(obs), decoder.reconstruction(feat, obs)
    assert (rough - tokens).abs().max() < 0.05 * tokens.abs().max()
    for key, loss in loose.items():
        assert torch.allclose(loss, losses[key], rtol=0.05)
    sum(loss.sum() for loss in loose.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_two_passes_over_the_same_images_are_bit_identical(nets):
    encoder, _, obs, _ = nets
    grads = [torch.autograd.grad(encoder(obs).square().sum(), list(encoder.parameters())) for _ in range(2)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_pictures_of_several_chunks_give_the_sum_of_their_gradients(backend):
    encoder = Encoder({"i": image(16, 16, 1)}, units=8, layers=1, depth=2, mults=(1, 2), kernel=3)
    encoder.compute_by(backend.encode)
    initialise(encoder, torch.Generator().manual_seed(0))
    pictures = torch.randint(0, 256, (MANY, 16, 16, 1), dtype=torch.uint8)
    parameters = list(encoder.parameters())
    whole = torch.autograd.grad(encoder({"i": pictures}).square().sum(), parameters)
    parts = [torch.autograd.grad(encoder({"i": one[None]}).square().sum(), parameters) for one in pictures]
    for a, *b in zip(whole, *parts, strict=True):
        agree(a, torch.stack(b).sum(0))


def everything(encoder, decoder, obs, feat):
    """Results and gradients, on as many threads as torch has now."""
    tokens, losses = encoder(obs), decoder.reconstruction(feat, obs)
    total = tokens.square().sum() + sum(loss.sum() for loss in losses.values())
    parameters = [feat, *encoder.parameters(), *decoder.parameters()]
    return [tokens, *losses.values(), *torch.autograd.grad(total, parameters)]


def level(generator, outputs, inputs, *, last=False):
    scale = None if last else torch.rand(outputs, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, inputs, 5, 5, generator=generator, requires_grad=True)
    return vision.Level(weight, torch.randn(outputs, generator=generator, requires_grad=True), scale)


def test_no_bit_of_the_images_depends_on_the_number_of_threads(backend):
    generator = torch.Generator().manual_seed(0)
    down, up = (
        [level(generator, 4, 3), level(generator, 8, 4)],
        [level(generator, 4, 8), level(generator, 3, 4, last=True)],
    )
    pictures = sample(image(20, 18, 3), MANY, generator)
    maps = torch.randn(MANY, 5, 5, 8, generator=generator, requires_grad=True)
    by_features, by_losses = (
        torch.randn(*shape, generator=generator) for shape in [(MANY, 5, 5, 8), (MANY, 1)]
    )
    into = (
        [tensor for one in down for tensor in one],
        [maps, *(t for one in up for t in one if t is not None)],
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            features = backend.encode(pictures, (2, 0), down)
            losses = backend.reconstruct(maps, pictures, [3], up)
            grads = torch.autograd.grad((features, losses), into[0] + into[1], (by_features, by_losses))
            results.append([features, losses, *grads])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_wide_networks_are_left_to_torch_by_the_library():
    if not available():
        pytest.skip(f"no compiled regions: {absence()}")
    obs, cnn = {"i": image(16, 16, 1)}, {"units": 8, "layers": 1, "depth": 2, "mults": (33, 33), "kernel": 3}
    encoder, decoder = Encoder(obs, **cnn), Decoder(obs, **cnn, **FEAT, blocks=2)
    initialise(encoder, torch.Generator().manual_seed(0))
    initialise(decoder, torch.Generator().manual_seed(0))
    pictures = {"i": torch.randint(0, 256, (3, 16, 16, 1), dtype=torch.uint8)}
    feat, results = torch.randn(3, 24, requires_grad=True), []
    for chosen in (TORCH, choose_backend("native", torch.device("cpu"), "fp32")):
        encoder.compute_by(chosen.encode)
        decoder.compute_by(chosen.reconstruct)
        results.append(everything(encoder, decoder, pictures, feat))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_what_is_not_a_number_stays_so_in_images(nets):
    encoder, decoder, obs, feat = nets
    with torch.no_grad():
        encoder.cnn[0].conv[0].bias[0] = torch.nan
        feat[1, 3] = torch.nan
    assert encoder(obs).isnan().any()
    for key in decoder.images[0].keys:
        assert decoder.reconstruction(feat, obs)[key].isnan().nonzero().tolist() == [[1]]
