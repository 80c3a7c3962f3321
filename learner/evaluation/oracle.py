"""The true simulator behind the contract of world models: it knows the answer, so it shows each ceiling.

A planner that fails with it is at fault itself; a model is at fault where it falls behind it.
Letters: B batch, T time, N imagined worlds, H horizon, S numbers of a state, A action width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.evaluation.rows import Rows, check_seen, map_leaves
from learner.evaluation.simulators import Simulator, States
from learner.interfaces import Capability, ImaginedPolicy, LossOut, Rollout, Tree, action_space, obs_space
from learner.nn.heads import decode_action, encode_action
from system.seeds import generator as seeded
from system.specs import ActionSpec, EnvSpec

Chooser = Callable[[States, np.random.Generator], NDArray[np.generic]]
"""Actions [N, K] as the environment takes them, in states [N, S]."""


class OracleModel:
    """Implements learner.interfaces.WorldModel. State: sim [B, S] float64, reward, cont, seen [B]."""

    caps: frozenset[Capability] = frozenset({"step", "reward", "cont", "decode"})

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.spec: EnvSpec = simulator.spec
        self.obs_space = {key: obs_space(spec) for key, spec in self.spec.obs.items()}
        self.action_space = action_space(self.spec.action)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """No parameters: there is nothing to learn."""
        return {}

    def after_step(self, applied: Tensor) -> None:
        del applied

    def loss(self, batch: Tree, carry: Tree, noise: Tree) -> LossOut:
        """Always 0: the truth has nothing to learn."""
        del carry, noise
        return LossOut(total=torch.zeros((), device=batch["is_first"].device), metrics={})

    def noise(self, batch: int, time: int, generator: torch.Generator) -> Tree:
        """None is needed."""
        del batch, time, generator
        return {}

    def initial(self, batch: int) -> Tree:
        """A state before anything was seen; `seen` is 0 until an observation comes."""
        sim = torch.zeros(batch, self.simulator.state_size, dtype=torch.float64)
        return {
            "sim": sim,
            "reward": torch.zeros(batch),
            "cont": torch.ones(batch),
            "seen": torch.zeros(batch),
        }

    def observe(
        self, carry: Tree, obs: Tree, prev_action: Tensor, is_first: Tensor, noise: Tree
    ) -> tuple[Tree, Tree]:
        """Where the world must be to look so; what cannot be seen is kept track of."""
        del noise
        found: list[Tree] = []
        state = map_leaves(lambda leaf: leaf.to(is_first.device), carry)
        for t in range(is_first.shape[1]):
            state = self._see(state, {k: v[:, t] for k, v in obs.items()}, prev_action[:, t], is_first[:, t])
            found.append(state)
        return state, map_leaves(lambda *rows: torch.stack(rows, 1), found[0], *found[1:])

    def _see(self, state: Tree, obs: Tree, action: Tensor, is_first: Tensor) -> Tree:
        """One row: obs [B, ...], action [B, A], is_first [B]."""
        expected, _ = self.step(state, action, {})
        shown = {key: value.cpu().numpy() for key, value in obs.items()}
        fresh = is_first | (state["seen"] == 0)
        sim = torch.where(
            fresh.unsqueeze(1),
            _tensor(self.simulator.locate(shown, None), expected["sim"]),
            _tensor(self.simulator.locate(shown, _array(expected["sim"])), expected["sim"]),
        )
        return {
            "sim": sim,
            "reward": torch.where(fresh, torch.zeros_like(expected["reward"]), expected["reward"]),
            "cont": torch.where(fresh, torch.ones_like(expected["cont"]), expected["cont"]),
            "seen": torch.ones_like(state["seen"]),
        }

    def step(self, state: Tree, action: Tensor, noise: Tree) -> tuple[Tree, Tree]:
        del noise
        native = decode_action(action, self.spec.action).cpu().numpy()
        sim, reward, terminal = self.simulator.step(_array(state["sim"]), native)
        after = {
            "sim": _tensor(sim, state["sim"]),
            "reward": _tensor(reward, state["reward"]),
            "cont": _tensor(~terminal, state["cont"]),
            "seen": state["seen"],
        }
        return after, {"reward": after["reward"], "cont": after["cont"]}

    def imagine(self, state: Tree, horizon: int, policy: ImaginedPolicy | Tensor, noise: Tree) -> Rollout:
        """What really follows. The policy sees {"feat": [N, S]} and the state."""
        del noise
        states, actions = [state], []
        for h in range(horizon):
            seen = states[-1] | {"feat": self.read(states[-1], frozenset({"feat"}))["feat"]}
            actions.append(policy[:, h] if isinstance(policy, Tensor) else policy(seen, h))
            states.append(self.step(states[-1], actions[-1], {})[0])
        rolled = map_leaves(lambda *rows: torch.stack(rows, 1), states[0], *states[1:])  # [N, H + 1, ...]
        reached = map_leaves(lambda leaf: leaf[:, 1:], rolled)
        feat = self.read(rolled, frozenset({"feat"}))["feat"]
        out = {key: reached[key] for key in ("reward", "cont")}
        return Rollout(state=reached, action=torch.stack(actions, 1), out=out, feat=feat)

    def read(self, state: Tree, what: frozenset[str]) -> Tree:
        """Any of feat (the simulator's state), reward, cont, obs (in environment units), of [..., S]."""
        out: Tree = {key: state[key] for key in ("reward", "cont") if key in what}
        if "feat" in what:
            out["feat"] = state["sim"].float()
        if "obs" in what:
            lead = state["sim"].shape[:-1]
            shown = self.simulator.show(_array(state["sim"].flatten(0, -2)))
            device = state["sim"].device
            out["obs"] = {
                key: torch.from_numpy(np.ascontiguousarray(value)).to(device).unflatten(0, lead)
                for key, value in shown.items()
            }
        return out


def _array(leaf: Tensor) -> NDArray[Any]:
    return leaf.detach().cpu().numpy()


def _tensor(array: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like)


def random_chooser(spec: ActionSpec) -> Chooser:
    """Uniform random actions."""
    return lambda state, rng: spec.sample(rng, len(state))


def simulated_rows(
    simulator: Simulator, *, sequences: int, time: int, seen: int, seed: int, choose: Chooser | None = None
) -> Rows:
    """Rows of `sequences` worlds from their first row on, an ended one starting anew; start: an oracle's.

    Raises: ConfigError as `rows.check_seen`.
    """
    check_seen(seen, time)
    rng, spec = seeded(seed, "simulated"), simulator.spec
    choose = choose or random_chooser(spec.action)
    state = simulator.reset(rng, sequences)  # [B, S]
    reward, terminal = np.zeros(sequences, np.float32), np.zeros(sequences, np.bool_)
    first = np.ones(sequences, np.bool_)
    action = np.zeros((sequences, *spec.action.shape), spec.action.dtype)
    obs: dict[str, list[Tensor]] = {key: [] for key in spec.obs}
    kept: dict[str, list[Tensor]] = {
        name: [] for name in ("prev_action", "reward", "is_first", "is_last", "is_terminal")
    }
    for _ in range(time):
        before = encode_action(torch.from_numpy(action), spec.action)  # [B, A]
        row = {"reward": reward, "is_first": first, "is_last": terminal, "is_terminal": terminal}
        kept["prev_action"].append(before * torch.from_numpy(~first).unsqueeze(1))
        for name, value in row.items():
            kept[name].append(torch.from_numpy(value))
        for key, value in simulator.show(state).items():
            obs[key].append(torch.from_numpy(np.ascontiguousarray(value)))
        action = np.asarray(choose(state, rng)).astype(spec.action.dtype)
        after, earned, ended = simulator.step(state, action)
        first = terminal
        state = np.where(first[:, None], simulator.reset(rng, sequences), after)
        reward, terminal = np.where(first, np.float32(0), earned), ended & ~first
    batch: Tree = {name: torch.stack(rows, 1) for name, rows in kept.items()}
    batch["obs"] = {key: torch.stack(rows, 1) for key, rows in obs.items()}
    return Rows(batch=batch, start=OracleModel(simulator).initial(sequences), seen=seen)
