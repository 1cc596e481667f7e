"""A transformer with full attention, from transformers' own classes."""

from __future__ import annotations

from transformers import LlamaConfig

from titans.baselines.systems.system import HEAD_DIM, Sizes, System

# Positions: longer than any text that is read here.
_LONGEST = 2**20


def transformer(sizes: Sizes) -> LlamaConfig:
    """A Llama, which the paper's table has as Transformer++."""
    return LlamaConfig(
        **sizes.as_a_transformer(),
        head_dim=HEAD_DIM,
        max_position_embeddings=_LONGEST,
    )


SYSTEMS: dict[str, System] = {
    "transformer": System("Transformer", "arXiv 2302.13971; LlamaForCausalLM of transformers", transformer)
}
