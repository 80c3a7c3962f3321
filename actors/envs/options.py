"""The env options every adapter honours, split from those handed on to the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from system.errors import ConfigError

Frame = Literal["auto", "chw", "hwc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvOptions:
    """Made by catalog.make_env, taken by the adapters."""

    action_repeat: int = 1  # simulator steps per row; rewards summed, stops at the end of an episode
    drop_obs: tuple[str, ...] = ()  # obs names left out
    as_vector: tuple[str, ...] = ()  # uint8 or integer obs names turned into float32 vectors
    frame: Frame = "auto"  # how image arrays come out of the simulator; rows always hold HWC
    time_limit: int | None = None  # simulator steps, counted by the backend
    max_restarts: int = 10
    restart_window: float = 300.0  # seconds
    backend: Mapping[str, Any] = field(default_factory=dict[str, Any])  # everything else, as it came

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EnvOptions:
        """Split raw options. Raises: ConfigError for a value that cannot be."""
        rest = dict(options)
        repeat = rest.pop("action_repeat", 1)
        if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 1:
            raise ConfigError(f"env option action_repeat ({repeat!r}) must be an integer >= 1")
        limit = rest.pop("time_limit", None)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"env option time_limit ({limit!r}) must be an integer >= 1, or left out")
        frame = rest.pop("frame", "auto")
        if frame not in ("auto", "chw", "hwc"):
            raise ConfigError(f"env option frame ({frame!r}) must be auto, chw or hwc")
        return cls(
            action_repeat=repeat,
            drop_obs=_names("drop_obs", rest.pop("drop_obs", ())),
            as_vector=_names("as_vector", rest.pop("as_vector", ())),
            frame=frame,
            time_limit=limit,
            max_restarts=int(rest.pop("max_restarts", 10)),
            restart_window=float(rest.pop("restart_window", 300.0)),
            backend=rest,
        )


def _names(option: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"env option {option} ({value!r}) must be a list of observation names")
    return tuple(value)
