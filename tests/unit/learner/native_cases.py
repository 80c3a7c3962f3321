"""Small worlds for the tests of the compiled regions: weights, starts and targets of any shape."""

import torch
from torch import Tensor

from learner.nn.action_distribution import ActionDistribution, BoundedNormals, Categoricals
from learner.nn.actor_critic import Factors, Targets
from learner.nn.bptt import CoreWeights, PosteriorWeights
from learner.nn.imagine import DynamicsWeights, Head, HeadWeights, Layer, Starts


class Case:
    """Draws everything from one seed. Letters: see `learner.nn.imagine`; V units of the heads."""

    def __init__(
        self, *, deter=24, hidden=10, units=9, stoch=5, classes=3, blocks=2, action=5, bins=21, seed=0
    ):
        self.deter, self.hidden, self.units, self.blocks = deter, hidden, units, blocks
        self.stoch, self.classes, self.action, self.bins = stoch, classes, action, bins
        self.flat = stoch * classes
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs) / inputs**0.5

    def layer(self, inputs: int, units: int) -> Layer:
        return Layer(self.weight(units, inputs), 0.1 * self.normal(units), 1.0 + 0.1 * self.normal(units))

    def head(self, inputs: int, units: int, layers: int, outputs: int) -> Head:
        hidden = tuple(self.layer(units if level else inputs, units) for level in range(layers))
        return Head(hidden, self.weight(outputs, units), 0.1 * self.normal(outputs))

    def one_hot(self, *lead: int) -> Tensor:
        """[*lead, C, S]."""
        index = torch.randint(self.classes, (*lead, self.stoch), generator=self.generator)
        return torch.nn.functional.one_hot(index, self.classes).float().transpose(-1, -2).contiguous()

    def core(self) -> CoreWeights:
        d, g, u = self.deter // self.blocks, self.blocks, self.hidden
        return CoreWeights(
            deter_in=self.weight(u, self.deter),
            deter_bias=0.1 * self.normal(u),
            stoch_in=self.weight(u, self.flat),
            stoch_bias=0.1 * self.normal(u),
            in_scale=1.0 + 0.1 * self.normal(2, u),
            own=self.normal(g, d, d) / self.deter**0.5,
            shared=self.normal(2 * u, self.deter) / self.deter**0.5,
            scale=1.0 + 0.1 * self.normal(self.deter),
            gates=self.normal(g, d, 3 * d) / d**0.5,
            gates_bias=0.1 * self.normal(g, 1, 3 * d),
        )

    def posterior(self) -> PosteriorWeights:
        return PosteriorWeights(
            deter_in=self.weight(self.hidden, self.deter),
            scale=1.0 + 0.1 * self.normal(self.hidden),
            logits=self.weight(self.flat, self.hidden),
            logits_bias=0.1 * self.normal(self.flat),
        )

    def rollout(self, time: int, batch: int) -> tuple[Tensor, ...]:
        """Inputs of a posterior rollout, from deter to uniform; some episodes begin inside."""
        return (
            torch.tanh(self.normal(batch, self.deter)),
            self.one_hot(batch).flatten(1),
            self.normal(time, batch, self.deter),
            self.normal(time, batch, self.hidden),
            (self.uniform(time, batch, 1) > 0.2).float(),
            self.uniform(time, batch, self.stoch),
        )

    def dynamics(self) -> DynamicsWeights:
        return DynamicsWeights(
            core=self.core(),
            action=self.layer(self.action, self.hidden),
            driver=self.weight(self.deter, self.hidden),
            bias=0.1 * self.normal(self.deter),
            prior=self.head(self.deter, self.hidden, 2, self.flat),
            unimix=0.01,
        )

    def heads(self, policy: ActionDistribution, depths: tuple[int, int, int, int, int]) -> HeadWeights:
        """depths: hidden layers of actor, critic, slow critic, reward, continuation."""
        outputs = self.action * (2 if isinstance(policy, BoundedNormals) else 1)
        widths = (outputs, self.bins, self.bins, self.bins, 1)
        inputs = self.deter + self.flat
        return HeadWeights(
            *(self.head(inputs, self.units, n, o) for n, o in zip(depths, widths, strict=True))
        )

    def starts(self, count: int, horizon: int, policy: ActionDistribution) -> Starts:
        if isinstance(policy, Categoricals):
            noise = self.uniform(count, horizon, len(policy.classes))
        else:
            noise = self.normal(count, horizon, self.action)
        return Starts(
            torch.tanh(self.normal(count, self.deter)),
            self.one_hot(count),
            noise,
            self.uniform(count, horizon, self.stoch),
        )

    def targets(self, horizon: int, count: int) -> Targets:
        return Targets(
            returns=10.0 * self.normal(horizon, count),
            advantage=self.normal(horizon, count),
            weight=self.uniform(horizon, count) / (horizon * count),
            replay_returns=5.0 * self.normal(count),
            replay_weight=self.uniform(count) / count,
        )


FACTORS = Factors(policy=1.0, value=0.7, replay_value=0.3, entropy=0.01, slow=0.9)
POLICIES = {
    "normals": BoundedNormals(0.1, 1.0),
    "categoricals": Categoricals((2, 3), 0.0),
    "mixed": Categoricals((2, 3), 0.05),
}
