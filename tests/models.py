"""Small random models of transformers that read a text in different ways."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)

from titans.data import byte_tokenizer

_SIZES: dict[str, Any] = dict(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
_RECURRENT: dict[str, Any] = dict(
    vocab_size=256, hidden_size=32, num_hidden_layers=2, eos_token_id=None, pad_token_id=None,
    bos_token_id=None,
)  # fmt: skip

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=7, max_position_embeddings=16),
    "mamba2": Mamba2Config(**_RECURRENT, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
    "qwen3_next": Qwen3NextConfig(
        **{**_SIZES, "num_hidden_layers": 2}, layer_types=["linear_attention", "full_attention"], head_dim=8,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    # Loses the past in a call of several tokens.
    "mamba": MambaConfig(**_RECURRENT, state_size=4),
}  # fmt: skip


def small_causal_lm(name: str, **changes: Any) -> PreTrainedModel:
    """In evaluation mode, with weights that give logits of some size."""
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), **changes})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def tokenizer_with_beginning() -> PreTrainedTokenizerFast:
    """A byte a token, and token 256 before a text, as Llama has it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer
