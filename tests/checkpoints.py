"""Folders of models so small that a test reads with them in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from titans.data import byte_tokenizer
from titans.hf import TitansConfig, TitansForCausalLM


def save_byte_model(folder: Path, **fields: Any) -> Path:
    """A model of bytes with random weights, always the same, and its tokenizer."""
    sizes = dict(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        head_dim=8, memory_depth=2, memory_expansion=2, num_persistent_tokens=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TitansForCausalLM(TitansConfig(**{**sizes, **fields})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
