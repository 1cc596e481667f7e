"""Parameters that accelerate keeps on the CPU or on disk, brought to the device a whole layer at a time.

accelerate attaches a hook to every module that has parameters, which brings them when the module is called
and takes them away afterwards. A layer reads parameters of modules that it does not call, as those from which
a memory starts, so here a layer's hooks run before it and after it, and none within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has a hook on this module; of an offloaded model it has on all with parameters."""
    return hasattr(module, "_hf_hook")


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module with a hook computes; None without one."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


@contextmanager
def all_parameters(layer: nn.Module) -> Iterator[None]:
    """Within this block every parameter of the layer is on the device where the layer computes."""
    hooked: list[Any] = [module for module in layer.modules() if module is not layer and is_offloaded(module)]
    forwards = [module.forward for module in hooked]
    for module in hooked:
        module._hf_hook.pre_forward(module)
        module.forward = module._old_forward
    try:
        yield
    finally:
        for module, forward in zip(hooked, forwards, strict=True):
            module.forward = forward
            module._hf_hook.post_forward(module, None)
