"""Who computes the learner's hot regions: torch, or the compiled library on CPUs that have a compiler.

Both give the same losses and gradients to rounding; a checkpoint moves between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from learner.native.library import absence, available
from learner.nn.actor_critic import actor_critic
from learner.nn.bptt_rows import posterior_rollout
from learner.nn.imagine_rows import imagine
from learner.nn.vision import encode, reconstruct
from system.errors import PreflightError

log = logging.getLogger(__name__)

BackendSetting = Literal["auto", "torch", "native"]


class Backend(NamedTuple):
    """One implementation of the regions of `learner.nn`: `bptt`, `imagine`, `actor_critic`, `vision`."""

    name: str
    rollout: Callable[..., Any]
    imagine: Callable[..., Any]
    actor_critic: Callable[..., Any]
    encode: Callable[..., Any]
    reconstruct: Callable[..., Any]


TORCH = Backend("torch", posterior_rollout, imagine, actor_critic, encode, reconstruct)


def choose_backend(setting: BackendSetting, device: torch.device, dtype: str) -> Backend:
    """auto: native where it can be had, else torch. A named backend is never silently replaced.

    Raises: PreflightError when native was asked for but cannot be had; it is for float32 on CPUs.
    """
    fits = device.type == "cpu" and dtype == "fp32"
    chosen = _native() if setting != "torch" and fits and available() else TORCH
    if setting == "native" and chosen is TORCH:
        cause = absence() if fits else f"it computes in fp32 on CPUs, not in {dtype} on {device.type}"
        raise PreflightError(
            f"learner backend native was asked for but cannot be had: {cause}; "
            "set the backend to auto or torch"
        )
    log.info("backend chosen", extra={"backend": chosen.name, "setting": setting})
    return chosen


def _native() -> Backend:
    from learner.native.actor_critic import actor_critic
    from learner.native.imagine import imagine
    from learner.native.rollout import posterior_rollout
    from learner.native.vision import encode, reconstruct

    return Backend("native", posterior_rollout, imagine, actor_critic, encode, reconstruct)
