"""Gated DeltaNet and Kimi Delta Attention, from transformers' own classes with their linear layers alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3NextConfig
from transformers.models.kimi_linear import KimiLinearConfig

from titans.baselines.systems.system import HEAD_DIM, Sizes, System


def gated_deltanet(sizes: Sizes) -> Qwen3NextConfig:
    """arXiv 2412.06464."""
    layers = sizes.layers
    return Qwen3NextConfig(
        **sizes.as_a_transformer(),
        head_dim=HEAD_DIM,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        linear_num_key_heads=sizes.heads,
        linear_num_value_heads=sizes.heads,
        layer_types=["linear_attention"] * layers,
        mlp_only_layers=[*range(layers)],
    )


def kda(sizes: Sizes) -> KimiLinearConfig:
    """arXiv 2510.26692."""
    return KimiLinearConfig(
        **sizes.as_a_transformer(),
        linear_head_dim=HEAD_DIM,
        linear_num_heads=sizes.heads,
        layer_types=["linear_attention"] * sizes.layers,
        mlp_layer_types=["dense"] * sizes.layers,
    )


def without_attention(model: PreTrainedModel) -> None:
    """Have a model whose layers are all linear read on from its cache, and without a GPU.

    Its class asks the cache for the sizes of attention masks, which only a layer of attention knows; it is
    given masks that hide nothing. And transformers takes the kernels of flash-linear-attention wherever that
    package can be imported, which fail without a GPU; the operations in torch take their place.
    """
    model.model.register_forward_pre_hook(_without_masks, with_kwargs=True)
    if torch.cuda.is_available():
        return
    module = sys.modules[type(model).__module__]
    for name, function in [*vars(module).items()]:
        original: Any = getattr(function, "__wrapped__", None)
        own = getattr(original, "__module__", None) == module.__name__
        if own and original.__name__ == name:
            setattr(module, name, original)


def _without_masks(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = {"full_attention": None, "linear_attention": None}
    return args, kwargs


SYSTEMS: dict[str, System] = {
    "gated-deltanet": System(
        "Gated DeltaNet",
        "arXiv 2412.06464; the linear layers of Qwen3NextForCausalLM of transformers",
        gated_deltanet,
        prepare=without_attention,
    ),
    "kda": System(
        "Kimi Delta Attention",
        "arXiv 2510.26692; the linear layers of KimiLinearForCausalLM of transformers",
        kda,
        prepare=without_attention,
    ),
}
