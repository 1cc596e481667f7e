"""What a block is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from titans.nn.combine import COMBINATIONS, MemoryGate, MemorySum
from titans.nn.memory import NeuralMemory
from titans.nn.memory.caching import CachedMemory, Caching
from titans.nn.memory.tnt.layer import TNTMemory


@dataclass(frozen=True)
class BlockSettings:
    """Sizes of one token-mixing block; every variant takes what it needs.

    memory_options: further keyword arguments of `NeuralMemory`, such as its form.
    local_chunk_sizes, shard_length: those of a `TNTMemory`, whose global memory's chunks chunk_size then are;
        None for a `NeuralMemory`.
    caching: that of a `CachedMemory`, None for none.
    periods: of Hope's continuum of memories, in tokens; None for those of its block.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    chunk_size: int
    segment_length: int
    window: int
    num_persistent_tokens: int
    conv_kernel: int
    memory_depth: int
    memory_expansion: int
    rope_theta: float
    norm_eps: float
    memory_combination: str = "gate"
    memory_options: dict[str, Any] = field(default_factory=dict)
    local_chunk_sizes: tuple[int, ...] | None = None
    shard_length: int | None = None
    caching: Caching | None = None
    periods: tuple[int, ...] | None = None

    def sizes(self, chunk_size: int) -> tuple[int, int, int, int, int, int]:
        """The sizes of a `NeuralMemory`, in its order, with chunks of so many tokens."""
        heads = self.num_heads, self.head_dim
        return self.hidden_size, *heads, self.memory_depth, self.memory_expansion, chunk_size

    def memory(self) -> NeuralMemory:
        """A memory of these sizes."""
        sizes = self.sizes(self.chunk_size)
        options: dict[str, Any] = {"conv_kernel": self.conv_kernel, **self.memory_options}
        if self.caching is not None:
            if reason := self.caching.refuses(self.chunk_size, self.local_chunk_sizes):
                raise ValueError(reason)
            return CachedMemory(*sizes, caching=self.caching, **options)
        if self.local_chunk_sizes is None or self.shard_length is None:
            return NeuralMemory(*sizes, **options)
        return TNTMemory(
            *sizes,
            local_chunk_sizes=self.local_chunk_sizes,
            shard_length=self.shard_length,
            **options,
        )

    def combination(self) -> MemoryGate | MemorySum:
        """What combines attention and memory."""
        return COMBINATIONS[self.memory_combination](self.hidden_size, self.norm_eps)

    def persistent_tokens(self) -> nn.Parameter:
        """Learned tokens (num_persistent_tokens, hidden_size), on the scale of a normalised token."""
        return nn.Parameter(torch.randn(self.num_persistent_tokens, self.hidden_size))
