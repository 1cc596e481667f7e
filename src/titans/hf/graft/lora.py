"""Low-rank changes of a base's linear layers (LoRA, arXiv 2106.09685), made by peft."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# In the names of parameters.
_MARK = ".lora_"


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _MARK in name


def lora_settings(given: Any) -> dict[str, Any]:
    """rank, alpha (the change is scaled by alpha / rank) and targets (ends of the names of linear layers, or
    "all-linear"), with defaults.

    Raises:
        ValueError: for something else.
    """
    settings: dict[str, Any] = {"rank": 8, "alpha": 16, "targets": "all-linear"}
    if not isinstance(given, Mapping) or not given.keys() <= settings.keys():
        raise ValueError(f"lora={given!r}: give a dict of {', '.join(settings)}")
    settings |= given
    for name in ("rank", "alpha"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise ValueError(f"lora has {name}={settings[name]!r}: give a whole number of at least 1")
    targets = settings["targets"]
    if not isinstance(targets, str) and not (
        isinstance(targets, (list, tuple)) and targets and all(isinstance(name, str) for name in targets)
    ):
        raise ValueError(f"lora has targets={targets!r}: give names of linear layers, or 'all-linear'")
    return {**settings, "targets": targets if isinstance(targets, str) else list(targets)}


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose parameters and buffers are the same numbers in memory.

    Layers of the copy can be replaced, frozen or moved to another device, and the model stays what it is.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


def add_lora(base: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Add adapters to a base, in place, that change nothing until they are trained; float32 at least.

    Raises:
        ValueError: if peft is missing, no layer has such a name, or the head has.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise ValueError("lora needs peft: pip install peft") from None
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"], lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(config, base)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"lora has targets={settings['targets']!r}: {reason}") from None
    if hasattr(base.get_output_embeddings(), "lora_A"):
        raise ValueError(
            f"lora has targets={settings['targets']!r}, and with them the head, whose rows memories read: "
            "leave it out"
        )
    for name, parameter in base.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


@contextmanager
def without_lora(base: nn.Module) -> Iterator[None]:
    """The base without its adapters, within the context."""
    layers: list[Any] = [module for module in base.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
