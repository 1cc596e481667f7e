"""How many keys a long-term memory can distinguish: the effective dimensions of its last matrix's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.evaluate.perplexity import TokenIds
from titans.hf import TitansForCausalLM
from titans.nn import NeuralMemory
from titans.stream.model import reading
from titans.stream.text import token_ids

# Tokens read at once: traces of every layer are held together.
_STRETCH = 1024


@dataclass(frozen=True)
class KeyDimensions:
    """Effective dimensions of one memory layer's keys over a sample, see `effective_dimensions`.

    key_width: of the vectors that the fast network takes; with features their number, else head_dim.
    keys: (heads,) float64 on the CPU, of those vectors.
    hidden_width, hidden: the same of the hidden features that the last fast matrix reads, at the weights of a
        memory that has read nothing; None for a memory of one matrix, which reads the keys themselves.
    """

    key_width: int
    keys: Tensor
    hidden_width: int | None = None
    hidden: Tensor | None = None

    @property
    def read_width(self) -> int:
        """The width of what the last fast matrix reads, the most that `read` can be."""
        return self.key_width if self.hidden_width is None else self.hidden_width

    @property
    def read(self) -> Tensor:
        """(heads,), effective dimensions of what the last fast matrix reads."""
        return self.keys if self.hidden is None else self.hidden


def effective_dimensions(vectors: Tensor) -> Tensor:
    """1 / E[cos²(x, y)] over pairs of different tokens: how many of them are as good as orthogonal.

    A matrix Σ v xᵀ that holds N pairs answers a key with its own value and a part cos(x, y) of every other,
    and the squares of these parts sum to (N − 1) / (this number), so about as many pairs are recalled. Random
    directions give the width, one direction gives 1, and nothing gives more than the width. Vectors are not
    centred, because a constant part disturbs every answer. Tokens that repeat a key lower the number too.

    Args:
        vectors: (tokens, ..., width), of any lengths; a vector of zeros is orthogonal to all others.

    Returns:
        (...) in float64.

    Raises:
        ValueError: for fewer than two tokens.

    Source: crosstalk in Kohonen, Correlation Matrix Memories, IEEE Transactions on Computers, 1972. Counting
    also pairs of a token with itself would give the participation ratio of the vectors' second moments.
    """
    tokens, width = vectors.shape[0], vectors.shape[-1]
    if tokens < 2:
        raise ValueError(f"vectors of {tokens} token(s): give at least two")
    unit = F.normalize(vectors.double(), dim=-1).movedim(0, -2)
    # Σ over all pairs of cos² is ‖Σ u uᵀ‖²: width², where a table of pairs would be tokens².
    all_pairs = (unit.mT @ unit).square().sum((-2, -1))
    with_itself = unit.square().sum(-1).square().sum(-1)
    mean = (all_pairs - with_itself) / (tokens * (tokens - 1))
    # Few tokens may happen to be closer to orthogonal than many can be.
    return 1 / mean.clamp_min(1 / width)


@torch.no_grad()
def key_dimensions(
    model: TitansForCausalLM,
    documents: Sequence[TokenIds],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[KeyDimensions]:
    """Read documents, each from the beginning, and measure the keys of every memory layer.

    Args:
        documents: token ids (n,) of each, two tokens at least in all.
        progress: called with the number of tokens read so far and in all.

    Returns:
        One entry per memory layer, in order; none for a model without a memory. Of a layer with local
        memories it is the global one's.

    Raises:
        ValueError: for documents with fewer than two tokens, or foreign token ids.
    """
    texts = [token_ids(ids, None, model.config.vocab_size) for ids in documents]
    total = sum(map(len, texts))
    if total < 2:
        raise ValueError(f"documents hold {total} token(s): give at least two")
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if not memories:
        return []
    found: list[list[Tensor]] = [[] for _ in memories]
    done = 0
    with reading(model):
        for text in filter(len, texts):
            cache = None
            for stretch in text.split(_STRETCH):
                ids = stretch[None].long().to(model.device)
                output = model.model(ids, past_key_values=cache, use_cache=True, output_trace=True)
                cache = output.past_key_values
                for trace, keys in zip(output.traces, found, strict=True):
                    keys.append(trace.keys[0])
                done += len(stretch)
                if progress is not None:
                    progress(done, total)
    return [_measure(memory, torch.cat(keys)) for memory, keys in zip(memories, found, strict=True)]


def _measure(memory: NeuralMemory, keys: Tensor) -> KeyDimensions:
    """Of the keys (tokens, heads, key_dim) that a memory has taken."""
    network = memory.network
    of_keys = effective_dimensions(keys).cpu()
    if network.depth == 1:
        return KeyDimensions(network.input_dim, of_keys)
    weights = [w.to(keys.dtype) for w in memory.initial_weights]
    hidden = network.features(weights, keys.transpose(0, 1))[0][-1].transpose(0, 1)
    return KeyDimensions(network.input_dim, of_keys, hidden.shape[-1], effective_dimensions(hidden).cpu())
