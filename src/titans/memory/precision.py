"""Where autocast is turned off: all arithmetic of a memory is in float32 at least."""

from __future__ import annotations

from torch import Tensor


def autocast_device(tensor: Tensor) -> str:
    """The device type whose autocast to turn off for a tensor; any other than "meta", which has none."""
    return "cpu" if tensor.is_meta else tensor.device.type
