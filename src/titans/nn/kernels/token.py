"""The next token of every row without autograd, which is decoding: a layer's part in one call (`token.cpp`).

A model opens `reading` around its layers. Inside, a forward asks `allows` and `weights_of`; where they agree,
an operator of `torch.ops.titans_native` computes what the lines after that question compute, for one token.
Otherwise those lines run.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor, nn

from titans.memory.backends.native.build import missing
from titans.memory.checks import inside_transform

_SOURCES = Path(__file__).parent
_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter)


class _Now(threading.local):
    """What this thread reads token by token: the dtype of its hidden states, or None."""

    dtype: torch.dtype | None = None


_now = _Now()


class reading:
    """A context in which a model's layers read x (batch, time, hidden_size): operators may run if it is the
    next token of every row, read as they know it. This is found out once, and not in every module."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype if _is_next_token(x) else None

    def __enter__(self) -> None:
        self.before, _now.dtype = _now.dtype, self.dtype

    def __exit__(self, *error: object) -> None:
        _now.dtype = self.before


def _is_next_token(x: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.dim() == 3
        and x.shape[1] == 1
        and x.shape[0] > 0
        and type(x) is Tensor
        and x.dtype in _DTYPES
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and torch.autograd.forward_ad._current_level < 0
        and not inside_transform()
        and missing() is None
        and missing(_SOURCES) is None
    )


def allows(x: Tensor) -> bool:
    """Whether x (batch, time, hidden_size) may be read by an operator, as far as x decides."""
    if torch.compiler.is_compiling():
        return False
    return _now.dtype is x.dtype and x.dim() == 3 and x.shape[1] == 1 and type(x) is Tensor and x.is_cpu


def alike(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether all tensors there are can be read with x: of its dtype, on the CPU, contiguous."""
    dtype = x.dtype
    for y in tensors:
        if y is not None and not (y.dtype is dtype and type(y) in _PLAIN and y.is_cpu and y.is_contiguous()):
            return False
    return True


def weights_of(x: Tensor, *modules: nn.Module) -> list[Tensor] | None:
    """The weights of modules whose forward is a product with their weight alone, or None.

    An adapter, a quantised weight, an offloaded one or a hook is something else, and so is a bias.
    """
    found = []
    for module in modules:
        own = module.__dict__
        parameters = own["_parameters"]
        weight = parameters.get("weight")
        if (
            weight is None
            or parameters.get("bias") is not None
            or not is_plain(module)
            or (isinstance(module, nn.Linear) and type(module) is not nn.Linear)
        ):
            return None
        found.append(weight)
    return found if alike(x, *found) else None


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward: no hook, nothing in its place."""
    own = module.__dict__
    return not own["_forward_hooks"] and not own["_forward_pre_hooks"] and "forward" not in own
