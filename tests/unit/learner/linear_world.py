"""Another world model than those of families: next row = A row + B action, fitted by least squares.

It shows everything a world may show (a box, a constant, classes, an image) and takes continuous actions.
Letters: B sequences, T rows, H horizon, D entries of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.evaluation.rows import Rows
from learner.interfaces import Capability, ImaginedPolicy, LossOut, Rollout, Space, Tree

SIZES = {"box": 3, "still": 2, "class": 1, "image": 4 * 4 * 3}
OBS = {
    "box": Space(kind="box", shape=(3,)),
    "still": Space(kind="box", shape=(2,)),
    "class": Space(kind="discrete", shape=(1,), classes=(3,)),
    "image": Space(kind="image", shape=(4, 4, 3)),
}


def shown(box: Tensor) -> Tree:
    """The observation [..., *] that belongs to the three numbers box [..., 3]."""
    grey = (128 + 10 * box[..., :1]).clamp(0, 255).round().to(torch.uint8)
    return {
        "box": box,
        "still": torch.full((*box.shape[:-1], 2), 0.25),
        "class": ((box[..., 1:2] > -1).int() + (box[..., 1:2] > 1).int()).to(torch.int32),
        "image": grey.view(*box.shape[:-1], 1, 1, 1).expand(*box.shape[:-1], 4, 4, 3).clone(),
    }


def linear_rows(
    size: int, time: int, seen: int, *, ends: float = 0.0, seed: int = 0, start: Tree | None = None
) -> Rows:
    """Rows of a damped spring that is pushed; each row ends its episode with probability `ends`."""
    generator = torch.Generator().manual_seed(seed)
    action = torch.rand(size, time, 2, generator=generator) * 2 - 1  # before each row
    over = torch.rand(size, time, generator=generator) < ends
    first = torch.cat([torch.ones(size, 1, dtype=torch.bool), over[:, :-1]], 1)
    action = action * ~first.unsqueeze(-1)
    states = []
    for t in range(time):
        fresh = torch.randn(size, 3, generator=generator)
        if t:
            x, y, z = states[-1].unbind(-1)
            moved = torch.stack(
                [x + 0.3 * y, y - 0.3 * x + 0.5 * action[:, t, 0], 0.9 * z + action[:, t, 1]], -1
            )
            fresh = torch.where(first[:, t].unsqueeze(-1), fresh, moved)
        states.append(fresh)
    box = torch.stack(states, 1)  # [B, T, 3]
    batch: Tree = {
        "obs": shown(box),
        "prev_action": action,
        "reward": box[..., 0] * ~first,
        "is_first": first,
        "is_last": over,
        "is_terminal": over,
    }
    return Rows(batch=batch, start=start if start is not None else {"box": torch.zeros(size, 3)}, seen=seen)


class LinearModel:
    """Implements learner.interfaces.WorldModel. State: box [B, 3]."""

    def __init__(self, caps: frozenset[Capability]) -> None:
        self.caps = caps
        self.obs_space, self.action_space = OBS, Space(kind="box", shape=(2,))
        self.weight = torch.zeros(5, 3)

    def fit(self, rows: Rows) -> LinearModel:
        """Least squares over all rows that do not begin an episode."""
        box = rows.batch["obs"]["box"]
        known = ~rows.batch["is_first"][:, 1:]
        before = torch.cat([box[:, :-1], rows.batch["prev_action"][:, 1:]], -1)[known]
        self.weight = torch.linalg.lstsq(before, box[:, 1:][known]).solution
        return self

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {}

    def after_step(self, applied: Tensor) -> None:
        del applied

    def loss(self, batch: Tree, carry: Tree, noise: Tree) -> LossOut:
        del batch, carry, noise
        return LossOut(total=torch.zeros(()), metrics={})

    def noise(self, batch: int, time: int, generator: torch.Generator) -> Tree:
        del batch, time, generator
        return {}

    def initial(self, batch: int) -> Tree:
        return {"box": torch.zeros(batch, 3)}

    def observe(
        self, carry: Tree, obs: Tree, prev_action: Tensor, is_first: Tensor, noise: Tree
    ) -> tuple[Tree, Tree]:
        """What is seen is all there is to know."""
        del carry, prev_action, is_first, noise
        return {"box": obs["box"][:, -1]}, {"box": obs["box"]}

    def step(self, state: Tree, action: Tensor, noise: Tree) -> tuple[Tree, Tree]:
        del noise
        after = {"box": torch.cat([state["box"], action], -1) @ self.weight}
        return after, self._outcome(after)

    def imagine(self, state: Tree, horizon: int, policy: ImaginedPolicy | Tensor, noise: Tree) -> Rollout:
        states, actions = [state], []
        for h in range(horizon):
            seen = states[-1] | {"feat": states[-1]["box"]}
            actions.append(policy[:, h] if isinstance(policy, Tensor) else policy(seen, h))
            states.append(self.step(states[-1], actions[-1], noise)[0])
        box = torch.stack([each["box"] for each in states], 1)  # [N, H + 1, 3]
        reached = {"box": box[:, 1:]}
        return Rollout(state=reached, action=torch.stack(actions, 1), out=self._outcome(reached), feat=box)

    def _outcome(self, state: Tree) -> Tree:
        all_ = {"reward": state["box"][..., 0], "cont": torch.ones(state["box"].shape[:-1])}
        return {key: value for key, value in all_.items() if key in self.caps}

    def read(self, state: Tree, what: frozenset[str]) -> Tree:
        out = self._outcome(state)
        if "decode" in self.caps:
            out["obs"] = shown(state["box"])
            out["obs"]["image"] = out["obs"]["image"].float()
        return {key: value for key, value in (out | {"feat": state["box"]}).items() if key in what}
