"""What can be compared of a model: its channels, and how far two values of a channel are apart.

Channels: `obs/<key>` of models that decode, `reward`, `cont` (does the episode go on), and `feat`, the
model's own features, which are compared with those it has after seeing the rows.
Letters: B sequences, H rows, E entries of one value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.interfaces import Space, Tree, WorldModel

Values = dict[str, Tensor]
"""One tensor [B, H, ...] per channel."""
LEAST_STD = 1e-6
"""Entries that vary less are compared as they are."""
OBS = "obs/"


def channels(model: WorldModel) -> dict[str, Space]:
    """Name and kind of everything that can be compared."""
    found = {f"{OBS}{key}": space for key, space in model.obs_space.items() if "decode" in model.caps}
    if "reward" in model.caps:
        found["reward"] = Space(kind="box")
    if "cont" in model.caps:
        found["cont"] = Space(kind="discrete", classes=(2,))
    return found | {"feat": Space(kind="latent")}


def compared(model: WorldModel) -> list[str]:
    """The channels by which futures are told apart: observations, or features where none are decoded."""
    return [name for name in channels(model) if name.startswith(OBS)] or ["feat"]


def read_values(model: WorldModel, states: Tree, out: Tree | None = None) -> Values:
    """What the model says in `states` [B, H, ...]; reward and continuation from `out` where given."""
    known = channels(model)
    outcome = frozenset({"reward", "cont"} & known.keys())
    what = {"feat"} | ({"obs"} if "decode" in model.caps else set())
    said = model.read(states, frozenset(what if out is not None else what | outcome))
    said |= {key: out[key] for key in outcome} if out is not None else {}
    values = {f"{OBS}{key}": value for key, value in said.get("obs", {}).items()}
    values |= {key: said[key] for key in ("reward", "feat") if key in said}
    if "cont" in said:
        values["cont"] = said["cont"] > 0.5
    return values


def true_values(model: WorldModel, batch: Tree, states: Tree) -> Values:
    """What was so in the rows `batch` [B, T, ...]; `feat` as the model has it after seeing them."""
    known = channels(model)
    values = {f"{OBS}{key}": value for key, value in batch["obs"].items() if f"{OBS}{key}" in known}
    if "reward" in known:
        values["reward"] = batch["reward"]
    if "cont" in known:
        values["cont"] = ~batch["is_terminal"]
    return values | {"feat": model.read(states, frozenset({"feat"}))["feat"]}


class Ruler:
    """Measures in standard deviations of the data, so that 1 is about as wrong as always saying the mean.

    One scale for all entries of a channel: in the environment's units, entries count as much as they vary.
    Or, with `each`, every entry in its own standard deviations: those that vary little count alike.
    """

    def __init__(self, spaces: Mapping[str, Space], truth: Values, inside: Tensor) -> None:
        """truth: [B, H, ...] per channel; inside [B, H] tells which rows count."""
        self._spaces = dict(spaces)
        self._std: Values = {}  # of each entry, [...]
        self.middle: Values = {}  # the constant that says most about each channel, [...]
        for key, space in self._spaces.items():
            rows = truth[key][inside]  # [R, ...]
            if not len(rows):
                rows = truth[key][:, 0]
            if space.kind == "discrete":
                self.middle[key] = rows.mode(0).values
                continue
            rows = rows.double()
            self._std[key], self.middle[key] = rows.std(0, correction=0), rows.mean(0)

    def squares(self, key: str, one: Tensor, other: Tensor, *, each: bool = False) -> Tensor:
        """Squared differences [B, H, E] of values [B, H, ...]; 0 or 1 where classes are compared."""
        if self._spaces[key].kind == "discrete":
            apart = (one != other).double()
        else:
            std = self._std[key]
            scale = std if each else std.square().mean().sqrt()
            scale = torch.where(scale > LEAST_STD, scale, torch.ones_like(scale))
            apart = ((one.double() - other.double()) / scale).square()
        return apart.unsqueeze(-1) if apart.dim() == 2 else apart.flatten(2)

    def distance(self, one: Values, other: Values, keys: list[str]) -> Tensor:
        """Mean squared difference [B, H] over the channels `keys`, each counting alike."""
        return torch.stack([self.squares(key, one[key], other[key]).mean(-1) for key in keys]).mean(0)
