"""The acting step of `learner.nn.acting` in few calls, on buffers that stay.

With a few environments an operation costs its call and not its arithmetic. So weights are joined and turned
when they are loaded; an RMS norm is one call of the only norm that torch has in one piece on CPUs (a layer
of outputs beside their negatives has mean zero, and its variance is the mean square); results go where they
are read next; uniforms for latents and discrete actions are drawn at once. Numbers are taken from the
generator in the order of the plain step, and both agree up to rounding.

Letters: n rows, D deter, S variables, C classes, Z = C*S, A action width, E token width, U units of any
layer, G blocks, d = D / G, F width of the vector observations, R width of the actor's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from learner.nn.acting import PlainStep
from learner.nn.action_distribution import BoundedNormals, Categoricals
from learner.nn.bptt import UPDATE_BIAS
from learner.nn.encoder import ImageEncoder, flat_size
from learner.nn.fast_images import FastImages
from learner.nn.layers import MLP, ROOT_EPS

EPS = float(ROOT_EPS**2)
Arrays = Mapping[str, NDArray[np.generic]]
PARTIAL_ROWS = 1024
"""Rows in all of the partial steps whose buffers are kept, one buffer for each number of rows."""


class _Pair(NamedTuple):
    """Outputs of a layer beside their negatives."""

    both: Tensor  # [n, 2U]
    left: Tensor  # [n, U]
    right: Tensor  # [n, U]

    @classmethod
    def of(cls, rows: int, units: int) -> _Pair:
        both = torch.empty(rows, 2 * units)
        return cls(both, *both.split(units, -1))


class _Norm(NamedTuple):
    """RMS norm with scale, then SiLU."""

    scale: Tensor  # [2U]
    units: int

    @classmethod
    def of(cls, scale: Tensor) -> _Norm:
        return cls(torch.cat([scale, scale]), len(scale))

    def __call__(self, pair: _Pair) -> Tensor:
        """[n, U] of the outputs in pair.left."""
        torch.neg(pair.left, out=pair.right)
        normed = torch.layer_norm(pair.both, self.scale.shape, self.scale, None, EPS)
        return F.silu(normed.narrow(-1, 0, self.units))


class _Dense(NamedTuple):
    """Affine map, RMS norm, SiLU."""

    weight: Tensor  # [I, U]
    bias: Tensor  # [U]
    norm: _Norm

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, scale: Tensor, order: Tensor | None = None) -> _Dense:
        """From weight [U, I]; `order` [I]: which entry of the layer's own input each entry of ours is."""
        weight = weight if order is None else weight[:, order]
        return cls(weight.t().contiguous(), bias.clone(), _Norm.of(scale))

    @classmethod
    def all_of(cls, mlp: MLP, order: Tensor | None = None) -> list[_Dense]:
        """The layers of an MLP; `order` for the first."""
        made: list[_Dense] = []
        for linear, norm in zip(mlp.linear, mlp.norm, strict=True):
            weight, bias, scale = (cast("Tensor", x) for x in (linear.weight, linear.bias, norm.scale))
            made.append(cls.of(weight, bias, scale, None if made else order))
        return made

    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        """[n, U] of x [n, I]."""
        pair = rows.pair(self.norm.units)
        torch.addmm(self.bias, x, self.weight, out=pair.left)
        return self.norm(pair)


class Rows:
    """State of n environments, and the buffers of their next step. Made by `FastStep.rows`.

    `state` is one array that the posterior reads from the left and the actor from the right.
    """

    def __init__(self, count: int, plain: PlainStep) -> None:
        rssm, encoder = plain.rssm, plain.encoder
        sizes, blocks, tokens = rssm.sizes, rssm.core.blocks, encoder.outputs
        deter = sizes.deter
        self.count = count
        self.ids = np.arange(count, dtype=np.int32).tobytes()
        self.state = torch.zeros(count, tokens + sizes.feat)  # [n, E + D + Z]: tokens, deter, stoch
        self.tokens, self.deter, self.stoch = self.state.split([tokens, deter, sizes.flat_stoch], -1)
        self.read = self.state[:, : tokens + deter]  # [n, E + D]
        self.feat = self.state[:, tokens:]  # [n, D + Z]
        self.action = torch.zeros(count, plain.action_width)  # [n, A]
        self._pairs: dict[int, _Pair] = {}
        self._core_buffers(sizes.hidden, deter, blocks)
        self._posterior_buffers(sizes.classes, sizes.stoch)
        kind = plain.actor.distribution
        uniforms = len(kind.classes) if isinstance(kind, Categoricals) else 0
        self.random = torch.empty(count * (sizes.stoch + uniforms))
        self.uniform = self.random[: count * sizes.stoch]
        self.uniform_rows = self.uniform.view(count, 1, sizes.stoch)
        self.noise = self.random[count * sizes.stoch :].view(count, uniforms)  # of discrete actions
        self.normal = torch.empty(count, plain.action_width)  # of continuous ones
        self.vector = torch.zeros(count, sum(flat_size(spec) for spec in encoder.vectors.values()))  # [n, F]
        self.vector_array = self.vector.numpy()

    def _core_buffers(self, units: int, deter: int, blocks: int) -> None:
        count = self.count
        self.blocked = self.deter.view(count, blocks, deter // blocks).transpose(0, 1)  # [G, n, d]
        # Of deter, stoch and action, each beside its negative.
        self.embedded = torch.empty(count, 3, 2 * units)
        self.embeds, self.negatives = self.embedded.split(units, -1)  # each [n, 3, U]
        self.embed_deter, self.embed_stoch, self.embed_action = self.embeds.unbind(1)  # each [n, U]
        self.inputs = torch.empty(count, 3, units)
        self.flat_inputs = self.inputs.view(count, 3 * units)  # [n, 3U]
        self.hidden = self.pair(deter)
        blocked = self.hidden.left.unflatten(-1, (blocks, deter // blocks))  # [n, G, d]
        self.hidden_blocked = blocked.transpose(0, 1)  # [G, n, d]
        self.own = torch.empty(blocks, count, deter // blocks)  # [G, n, d]
        self.gates = torch.empty(blocks, count, 3 * deter // blocks)  # [G, n, 3d]: reset, update, candidate
        self.squashed, self.candidate = self.gates.split([2 * deter // blocks, deter // blocks], -1)
        self.reset, self.update = self.squashed.chunk(2, -1)  # each [G, n, d]

    def _posterior_buffers(self, classes: int, stoch: int) -> None:
        self.sample = self.stoch.unflatten(-1, (classes, stoch))  # [n, C, S]
        self.logits = torch.empty(self.count, classes * stoch)  # [n, Z]
        self.by_class = self.logits.view(self.count, classes, stoch)
        # Does the uniform lie above the class? 1 before the first, 0 after the last: differences are one-hot.
        self.above = torch.zeros(self.count, classes + 1, stoch)
        self.above[:, 0] = 1.0
        self.above_inner = self.above[:, 1:classes]  # [n, C - 1, S]
        self.above_array = self.above_inner.numpy()
        self.above_lower, self.above_upper = self.above[:, :classes], self.above[:, 1:]  # each [n, C, S]

    def pair(self, units: int) -> _Pair:
        """The buffer of a layer's outputs."""
        if units not in self._pairs:
            self._pairs[units] = _Pair.of(self.count, units)
        return self._pairs[units]

    def forget(self, is_first: NDArray[np.bool_]) -> None:
        """Rows [n] that begin an episode start from zero."""
        if np.count_nonzero(is_first):
            index = torch.from_numpy(np.flatnonzero(is_first))
            self.feat.index_fill_(0, index, 0.0)
            self.action.index_fill_(0, index, 0.0)

    def take(self, others: Rows, index: Tensor) -> None:
        """Become rows index [n] of `others`."""
        self._owner = others, index
        self.feat.copy_(others.feat.index_select(0, index))
        torch.index_select(others.action, 0, index, out=self.action)

    def give_back(self) -> None:
        """Write the state to where `take` found it."""
        others, index = self._owner
        others.feat.index_copy_(0, index, self.feat)
        others.action.index_copy_(0, index, self.action)

    def stoch_index(self) -> NDArray[np.uint8]:
        """Class of each variable [n, S] in the newest sample."""
        return np.add.reduce(self.above_array, axis=1).astype(np.uint8)


class _Core(NamedTuple):
    """Weights of the recurrent step."""

    deter: Tensor  # [D, U]
    stoch: Tensor  # [Z, U]
    action: Tensor  # [A, U]
    biases: tuple[Tensor, Tensor, Tensor]  # each [U]
    scales: Tensor  # [3, U]
    shared: Tensor  # [3U, D], what all blocks read alike
    shared_bias: Tensor  # [D]
    own: Tensor  # [G, d, d]
    norm: _Norm
    gates: Tensor  # [G, d, 3d], turned to reset, update, candidate
    gates_bias: Tensor  # [G, 1, 3d]; that of the update holds its constant

    @classmethod
    def of(cls, plain: PlainStep) -> _Core:
        core = plain.rssm.core
        (action,) = _Dense.all_of(core.action_in)
        weights, driver = core.weights()
        turned = [part.chunk(3, -1) for part in (weights.gates, weights.gates_bias)]
        gates, bias = (torch.cat([reset, update, candidate], -1) for reset, candidate, update in turned)
        bias[..., bias.shape[-1] // 3 : 2 * bias.shape[-1] // 3] += UPDATE_BIAS
        return cls(
            deter=weights.deter_in.t().contiguous(),
            stoch=weights.stoch_in.t().contiguous(),
            action=action.weight,
            biases=(weights.deter_bias.clone(), weights.stoch_bias.clone(), action.bias),
            scales=torch.cat([weights.in_scale, action.norm.scale[: action.norm.units].unsqueeze(0)]),
            shared=torch.cat([weights.shared, driver.weight.t()]).contiguous(),
            shared_bias=driver.bias.clone(),
            own=weights.own.contiguous(),
            norm=_Norm.of(weights.scale),
            gates=gates,
            gates_bias=bias,
        )

    def __call__(self, rows: Rows) -> None:
        """Take rows.deter, stoch and action to the next deter, in place."""
        torch.addmm(self.biases[0], rows.deter, self.deter, out=rows.embed_deter)
        torch.addmm(self.biases[1], rows.stoch, self.stoch, out=rows.embed_stoch)
        torch.addmm(self.biases[2], rows.action, self.action, out=rows.embed_action)
        torch.neg(rows.embeds, out=rows.negatives)
        normed = torch.layer_norm(rows.embedded, rows.embedded.shape[-1:], None, None, EPS)
        torch.mul(normed.narrow(-1, 0, self.scales.shape[1]), self.scales, out=rows.inputs)
        F.silu(rows.inputs, inplace=True)
        torch.addmm(self.shared_bias, rows.flat_inputs, self.shared, out=rows.hidden.left)
        torch.bmm(rows.blocked, self.own, out=rows.own)
        rows.hidden_blocked.add_(rows.own)
        active = self.norm(rows.hidden)  # [n, D]
        blocked = active.view(rows.count, *self.own.shape[:2]).transpose(0, 1)  # [G, n, d]
        torch.baddbmm(self.gates_bias, blocked, self.gates, out=rows.gates)
        rows.squashed.sigmoid_()
        rows.candidate.mul_(rows.reset).tanh_()
        torch.lerp(rows.blocked, rows.candidate, rows.update, out=rows.blocked)


class _Posterior(NamedTuple):
    """Weights of the posterior, which reads tokens, then deter."""

    hidden: _Dense
    logits: Tensor  # [U, Z]
    logits_bias: Tensor  # [Z]
    share: float  # of the softmax; the rest is uniform
    floor: Tensor  # [], probability that every class has

    @classmethod
    def of(cls, plain: PlainStep) -> _Posterior:
        part, sizes = plain.rssm.posterior, plain.rssm.sizes
        inputs = part.linear.weight.shape[1]
        order = torch.arange(inputs).roll(-sizes.deter)
        return cls(
            hidden=_Dense.of(part.linear.weight, part.linear.bias, part.norm.scale, order),
            logits=part.logits.weight.t().contiguous(),
            logits_bias=part.logits.bias.clone(),
            share=1.0 - sizes.unimix,
            floor=torch.tensor(sizes.unimix / sizes.classes),
        )

    def __call__(self, rows: Rows) -> None:
        """Sample rows.stoch with rows.uniform."""
        torch.addmm(self.logits_bias, self.hidden(rows.read, rows), self.logits, out=rows.logits)
        probs = torch.add(self.floor, torch.softmax(rows.by_class, 1), alpha=self.share)
        below = probs.cumsum(1).narrow(1, 0, probs.shape[1] - 1)  # [n, C - 1, S]
        torch.lt(below, rows.uniform_rows, out=rows.above_inner)
        torch.sub(rows.above_lower, rows.above_upper, out=rows.sample)


class FastStep:
    """The step of a `PlainStep`, with the weights it had when `join` was called last."""

    def __init__(self, plain: PlainStep) -> None:
        self._plain = plain
        self._partial: dict[int, Rows] = {}
        encoder = plain.encoder
        self._image_at = encoder.mlp.outputs if encoder.vectors else 0
        self._place_vectors()
        self.join()

    def _place_vectors(self) -> None:
        """Give each vector-like key its columns: numbers first, so that one symlog reads them all."""
        specs = self._plain.encoder.vectors
        starts = dict(zip(specs, np.cumsum([0, *map(flat_size, specs.values())])[:-1], strict=True))
        self._slots: list[tuple[str, int, int, int]] = []  # key, first and last column, classes or 0
        order: list[int] = []
        for key in sorted(specs, key=lambda key: specs[key].kind == "discrete"):
            size, at = flat_size(specs[key]), len(order)
            self._slots.append(
                (key, at, at + size, specs[key].classes if specs[key].kind == "discrete" else 0)
            )
            order += range(starts[key], starts[key] + size)
        self._order = torch.tensor(order, dtype=torch.int64)
        self._numbers = sum(last - first for _, first, last, classes in self._slots if not classes)

    def join(self) -> None:
        """Take over the weights of the modules."""
        plain = self._plain
        encoder = plain.encoder
        self._images = [
            (group.keys, FastImages(cast("ImageEncoder", cnn)))
            for group, cnn in zip(encoder.images, encoder.cnn, strict=True)
        ]
        self._mlp = _Dense.all_of(plain.encoder.mlp, self._order) if plain.encoder.vectors else []
        self._core, self._posterior = _Core.of(plain), _Posterior.of(plain)
        head = plain.actor.weights()
        self._actor = _Dense.all_of(plain.actor.mlp)
        self._outputs, self._outputs_bias = head.weight.t().contiguous(), head.bias.clone()

    def rows(self, count: int) -> Rows:
        """The zero state of `count` environments."""
        return Rows(count, self._plain)

    def borrow(self, rows: Rows, env_id: NDArray[np.int32]) -> Rows:
        """The state of environments env_id [n]: `rows` itself when they are all of them in order, else a copy
        to be given back after the step.
        """
        if env_id.tobytes() == rows.ids:
            return rows
        count = len(env_id)
        if count not in self._partial:
            while self._partial and sum(self._partial) + count > PARTIAL_ROWS:
                self._partial.pop(next(iter(self._partial)))
            self._partial[count] = self.rows(count)
        part = self._partial[count]
        part.take(rows, torch.from_numpy(env_id.astype(np.int64)))
        return part

    def __call__(self, rows: Rows, obs: Arrays, generator: torch.Generator, *, greedy: bool) -> None:
        """Filter obs [n, ...] into rows.deter and rows.stoch and put the chosen action into rows.action.

        Continuous actions are clipped to [-1, 1], discrete ones are one-hots.
        """
        kind = self._plain.actor.distribution
        normal = isinstance(kind, BoundedNormals)
        (rows.uniform if greedy or normal else rows.random).uniform_(generator=generator)
        self._encode(rows, obs)
        self._core(rows)
        self._posterior(rows)
        x = rows.feat
        for layer in self._actor:
            x = layer(x, rows)
        outputs = torch.addmm(self._outputs_bias, x, self._outputs)  # [n, R]
        raw = kind.raw(outputs)
        if greedy:
            action = kind.mode(raw)
        else:
            noise = rows.normal.normal_(generator=generator) if normal else rows.noise
            action = kind.sample(raw, noise)
        if normal:
            torch.clamp(action, -1.0, 1.0, out=rows.action)
        else:
            rows.action.copy_(action)

    def _encode(self, rows: Rows, obs: Arrays) -> None:
        """Tokens of obs [n, ...] into rows.tokens."""
        if self._slots:
            for key, first, last, classes in self._slots:
                value = obs[key].reshape(rows.count, (last - first) // (classes or 1))
                if classes:
                    value = (value[..., None] == np.arange(classes)).reshape(rows.count, last - first)
                rows.vector_array[:, first:last] = value
            numbers = rows.vector.narrow(1, 0, self._numbers)
            torch.copysign(numbers.abs().log1p_(), numbers, out=numbers)
            x = rows.vector
            for layer in self._mlp:
                x = layer(x, rows)
            rows.tokens.narrow(1, 0, x.shape[1]).copy_(x)
        at = self._image_at
        for keys, images in self._images:
            parts = [torch.from_numpy(np.ascontiguousarray(obs[key])) for key in keys]
            tokens = images(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
            rows.tokens.narrow(1, at, tokens.shape[1]).copy_(tokens)
            at += tokens.shape[1]
