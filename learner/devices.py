"""Turns a device setting into a torch device, and says which one it took."""

from __future__ import annotations

import logging

import torch

from system.errors import ConfigError, PreflightError

log = logging.getLogger(__name__)


def resolve_device(setting: str) -> torch.device:
    """auto: CUDA when this torch sees a card, else the CPU. A named device is never silently replaced.

    Raises: PreflightError when the device asked for is absent, ConfigError for an unknown name.
    """
    if setting == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log.info("device chosen", extra={"device": describe(device), "setting": setting})
        return device
    kind, _, index = setting.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(
            f"device {setting!r} must be auto, cpu, cuda or cuda:<index>; correct learner.device"
        )
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= int(index or 0):
            raise PreflightError(
                f"device {setting!r} was asked for but torch {torch.__version__} sees {count} CUDA devices; "
                "install a CUDA build of torch and its driver, or set learner.device to auto or cpu"
            )
    return torch.device(setting)


def rank_device(setting: str, rank: int, ranks: int, *, own_card: bool = False) -> str:
    """The device setting of one learner rank: every rank has a card of its own, or all are on the CPU.

    `own_card`: this process is shown no card but its own.
    Raises: ConfigError for one numbered card, PreflightError for fewer cards than ranks.
    """
    if ranks == 1 or setting == "cpu":
        return setting
    if ":" in setting:
        raise ConfigError(
            f"learner.device ({setting}) is one card and learner.ranks is {ranks}; set learner.device=cuda: "
            "rank k then takes card k"
        )
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards == 0:
        return setting  # auto: the CPU; cuda: refused by whoever resolves it
    if own_card:
        return "cuda:0"
    if cards < ranks:
        raise PreflightError(
            f"learner.ranks ({ranks}) needs as many CUDA devices, this machine shows {cards}; lower "
            "learner.ranks, or set learner.device=cpu"
        )
    return f"cuda:{rank}"


def describe(device: torch.device) -> str:
    """A name a person recognises: cuda:0 (NVIDIA H200), cpu (2 threads)."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
