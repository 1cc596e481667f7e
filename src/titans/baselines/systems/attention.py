"""A transformer with full attention, from transformers' own classes."""

from __future__ import annotations

from transformers import LlamaConfig

from titans.baselines.systems.system import HEAD_DIM, Sizes, System

# Positions: longer than any text that is read here.
_LONGEST = 2**20


def transformer(sizes: Sizes) -> LlamaConfig:
    """A Llama, which the paper's table has as Transformer++."""
    return LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=_LONGEST,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


SYSTEMS: dict[str, System] = {
    "transformer": System("Transformer", "arXiv 2302.13971; LlamaForCausalLM of transformers", transformer)
}
