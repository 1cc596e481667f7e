"""A model as streams use it: without its wrappers, in evaluation mode while it reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> Any:
    """The model of transformers inside wrappers of torch.compile, DDP and PEFT.

    Raises:
        ValueError: for prompt learning with PEFT, which puts its prompt before every piece anew.
    """
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                kind = model.active_peft_config.peft_type
                raise ValueError(
                    f"{type(model).__name__} with {getattr(kind, 'value', kind)}: a learned prompt stands "
                    "before every piece anew; use an adapter inside the layers, such as LoRA"
                )
            inner = model.get_base_model()
        else:
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None or inner is model:
            break
        model = inner
    return model


@dataclass
class _Mode:
    """How many are reading with a model, and which of its modules were in training mode before."""

    readers: int
    training: list[nn.Module]


_MODES: WeakKeyDictionary[Any, _Mode] = WeakKeyDictionary()
_MODES_LOCK = threading.Lock()


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """No gradients, and evaluation mode for as long as any thread reads with the model.

    Every module is in its own mode again when the last of them ends.
    """
    with _MODES_LOCK:
        mode = _MODES.setdefault(model, _Mode(0, []))
        if not mode.readers:
            mode.training = [module for module in model.modules() if module.training]
            if mode.training:
                model.eval()
        mode.readers += 1
    try:
        with torch.no_grad():
            yield
    finally:
        with _MODES_LOCK:
            mode.readers -= 1
            if not mode.readers:
                for module in mode.training:
                    module.training = True
                del _MODES[model]
