"""Figures of an update that only the health monitor reads, as tensors [] on the device: no host sync.

Called by an agent's update; each costs a pass over something small. Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.distributed import mean_over_ranks, rank_count
from learner.interfaces import Tree

Regions = Mapping[str, slice]


def module_regions(names: Sequence[str], sizes: Sequence[int]) -> dict[str, slice]:
    """Where the parameters of each module lie in a flat buffer: <owner>.<module>.<rest> -> module."""
    regions: dict[str, slice] = {}
    end, last = 0, ""
    for name, size in zip(names, sizes, strict=True):
        module = name.split(".")[1]
        assert module == last or module not in regions, f"parameters of {module} do not lie together"
        begun = regions[module].start if module in regions else end
        end, last = end + size, module
        regions[module] = slice(begun, end)
    return regions


def region_norms(flat: Tensor, regions: Regions, prefix: str) -> dict[str, Tensor]:
    """Euclidean norm [] of each region of a flat buffer; not finite when any entry is not."""
    return {f"{prefix}{name}": torch.linalg.vector_norm(flat[part]) for name, part in regions.items()}


def region_peaks(flat: Tensor, regions: Regions) -> dict[str, Tensor]:
    """Largest magnitude [] of each region of a flat buffer; not finite exactly when some entry is not."""
    return {name: flat[part].abs().amax() for name, part in regions.items()}


def input_signals(rows: Tree, start: Tree) -> dict[str, Tensor]:
    """Entries that are not finite, per floating-point input: input/<key>; and replayed reward statistics.

    rows as `prepare` returns them: obs, prev_action, reward [B, T, ...]; start: the stored latents.
    """
    inputs: Tree = rows["obs"] | {"reward": rows["reward"], "action": rows["prev_action"]}
    inputs |= {f"stored {key}": value for key, value in start.items()}
    out = {  # metrics become means over ranks, which must say how many there are in the whole batch
        f"input/{key}": (~torch.isfinite(value)).sum().float() * rank_count()
        for key, value in inputs.items()
        if value.is_floating_point()
    }
    reward = rows["reward"].float()
    mean = mean_over_ranks(reward.mean())
    out["replayed/reward"] = mean
    out["replayed/reward_std"] = mean_over_ranks((reward - mean).square().mean()).sqrt()
    return out


def value_signals(value: Tensor, target: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Mean value and return of replayed rows, spread of returns; all [B, T], rows of weight 0 left out."""
    # Ranks have as many rows, but not as much weight: sums are shared, not quotients.
    sums = mean_over_ranks(torch.stack([weight, weight * target, weight * value]).flatten(1).sum(1))  # [3]
    total = sums[0].clamp_min(1.0)
    mean = sums[1] / total
    return {
        "replayed/value": sums[2] / total,
        "replayed/return": mean,
        "replayed/return_std": (mean_over_ranks((weight * (target - mean).square()).sum()) / total).sqrt(),
    }
