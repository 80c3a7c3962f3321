"""Small encodings of latent arrays for replay columns: bfloat16 bits as uint16, one-hots as uint8."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.nn.categorical import one_hot


def pack_float(x: Tensor) -> NDArray[np.uint16]:
    """Float tensor [...] as the bits of its bfloat16 rounding."""
    return x.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()


def unpack_float(bits: NDArray[np.uint16], device: torch.device) -> Tensor:
    """Inverse of `pack_float`, float32 on `device`."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16).to(device).float()


def class_index(x: Tensor) -> Tensor:
    """One-hots [..., C, S] with C <= 256 as class indices [..., S], uint8, on the same device."""
    # A product with 0..C-1 finds the one; argmax over a short axis is many times slower on CPUs.
    positions = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
    return (positions @ x.detach()).round().to(torch.uint8)


def pack_one_hot(x: Tensor) -> NDArray[np.uint8]:
    """`class_index` on the host."""
    return class_index(x).cpu().numpy()


def unpack_one_hot(index: NDArray[np.uint8], classes: int, device: torch.device) -> Tensor:
    """Class indices [..., S] as one-hots [..., C, S]. Indices beyond the classes are clipped."""
    return one_hot(torch.from_numpy(np.minimum(index, classes - 1).astype(np.int64)).to(device), classes)
