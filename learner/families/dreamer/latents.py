"""How a latent state travels in replay rows: deter as bfloat16 bits, stoch as class indices.

The policy stores them, the learner reads them as context and writes fresher ones back. Imports no torch.
"""

from __future__ import annotations

from learner.families.dreamer.config import DreamerConfig
from system.specs import ArraySpec


def latent_columns(config: DreamerConfig) -> dict[str, ArraySpec]:
    """Overlay columns of one row: deter [D] uint16 (bfloat16 bits), stoch [S] uint8."""
    return {
        "deter": ArraySpec(shape=(config.deter,), dtype="uint16"),
        "stoch": ArraySpec(shape=(config.stoch,), dtype="uint8"),
    }
