"""The border guard of every adapter: which env ids owe an action, and whether the one sent is sound.

Native simulators abort, segfault or silently accept bad actions, so nothing passes unchecked.
Letters: N environments, n rows of one call, A action width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from system.errors import EnvError
from system.specs import ActionSpec


class SendGate:
    """Keeps the contract "every row that is not is_last wants exactly one action"."""

    def __init__(self, spec: ActionSpec, num_envs: int) -> None:
        self._spec = spec
        self._dtype = np.dtype(spec.dtype)
        self._classes = np.asarray(spec.classes, np.uint32)
        self._num_envs = num_envs
        self.owed: NDArray[np.bool_] = np.zeros(num_envs, np.bool_)  # [N], shown and not answered

    def reset(self) -> None:
        """Forget all open rows: the environments start anew."""
        self.owed[:] = False

    def shown(self, env_id: NDArray[np.int32], is_last: NDArray[np.bool_]) -> None:
        """Note rows [n] handed to the caller."""
        self.owed[env_id] = ~is_last

    def take(
        self, action: NDArray[np.generic], env_id: NDArray[np.int32]
    ) -> tuple[NDArray[np.generic], NDArray[np.int32]]:
        """Return checked (action [n, A], env_id [n]) and mark those rows answered.

        Raises: EnvError for a wrong type, shape, dtype or id, a non-finite or out-of-range action,
        a repeated answer or an answer nobody asked for.
        """
        ids = np.asarray(env_id)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise EnvError(f"env_id has shape {ids.shape} dtype {ids.dtype}, must be integers [n]")
        n = len(ids)
        if not isinstance(action, np.ndarray) or action.shape != (n, *self._spec.shape):
            raise EnvError(
                f"action has shape {np.shape(action)}, must be an array {(n, *self._spec.shape)}: "
                "one row for each env_id"
            )
        if action.dtype != self._dtype:
            raise EnvError(f"action has dtype {action.dtype}, must be {self._dtype}; cast it in the policy")
        if n == 0:
            return action, ids.astype(np.int32)
        if int(ids.min()) < 0 or int(ids.max()) >= self._num_envs:
            raise EnvError(f"env_id {ids.tolist()} must lie in [0, {self._num_envs})")
        self._check_values(action)
        before = np.count_nonzero(self.owed)
        if not self.owed[ids].all():
            idle = ids[~self.owed[ids]].tolist()
            raise EnvError(f"env_id {idle} wants no action now: answer each row once, and never is_last rows")
        self.owed[ids] = False
        if before - np.count_nonzero(self.owed) != n:
            self.owed[ids] = True  # refused as a whole
            raise EnvError(f"env_id {ids.tolist()} has repeats; send exactly one action per environment")
        return action, ids.astype(np.int32, copy=False)

    def _check_values(self, action: NDArray[np.generic]) -> None:
        if self._spec.kind == "discrete":
            index = action.astype(np.int32, copy=False)
            if (index.view(np.uint32) >= self._classes).any():  # negative ones become huge
                raise EnvError(
                    f"discrete action outside [0, {self._spec.classes}): "
                    f"min {index.min(0).tolist()}, max {index.max(0).tolist()}; correct the policy"
                )
        elif not np.isfinite(action).all():
            raise EnvError("continuous action holds NaN or infinity; check the policy's weights and inputs")
