"""What the gates of the long-term memories have learned: how fast they forget, and how hard they write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.evaluate.perplexity import TokenIds
from titans.hf import TitansCache, TitansForCausalLM
from titans.nn import BlockContext, NeuralMemory
from titans.nn.memory import NeuralMemoryState
from titans.stream.model import reading
from titans.stream.reader import initial_states
from titans.stream.saved import find_states
from titans.stream.text import token_ids


@dataclass(frozen=True)
class LayerGates:
    """The gates of one memory layer over a sample, (heads, depth) each, float64 on the CPU.

    half_life_at_rest: in tokens, for an input of zero; inf where nothing is ever forgotten.
    half_life_10, half_life_median, half_life_90: quantiles over the tokens of the sample.
    momentum_mean: mean of eta.
    step_size_median: median of the applied theta, divided by its normalizer with `normalize_step`.
    write_strength_median: median of theta / (1 − eta), what a token's surprise is written with in the end.
    """

    half_life_at_rest: Tensor
    half_life_10: Tensor
    half_life_median: Tensor
    half_life_90: Tensor
    momentum_mean: Tensor
    step_size_median: Tensor
    write_strength_median: Tensor


def gate_statistics(
    model: TitansForCausalLM,
    documents: Sequence[TokenIds],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerGates]:
    """Read documents, each from the beginning, and describe the gates of every memory layer.

    A chunk at a time, because step sizes are normalized at the weights with which a chunk begins. Of a layer
    with local memories the gates are the global one's.

    Args:
        documents: token ids (n,) of each.
        progress: called with the number of tokens read so far and in all.

    Returns:
        One entry per memory layer, in order; none for a model without a memory.

    Raises:
        ValueError: for documents without a token, foreign token ids, or a variant with several memories in a
            layer.
    """
    texts = [token_ids(ids, None, model.config.vocab_size) for ids in documents]
    total = sum(map(len, texts))
    if not total:
        raise ValueError("documents hold no token: give at least one of one token or more")
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if not memories:
        return []
    if len(memories) != model.config.num_hidden_layers:
        raise ValueError(
            f"a layer of variant {model.config.variant!r} has several memories, and a trace of one: measure "
            "the gates of a model of another variant"
        )
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in memories]
    done, length = 0, model.config.chunk_size
    with reading(model):
        initial = initial_states(model)
        at_rest = []
        for memory, state in zip(memories, find_states(NeuralMemoryState, initial), strict=True):
            nothing = memory.gate_weight.new_zeros(1, 1, memory.gate_weight.shape[1])
            _, _, trace = memory(nothing, state, context=BlockContext(trace=True))
            at_rest.append(trace.forget)
        for text in filter(len, texts):
            cache = TitansCache(model.config)
            cache.store(initial, 0)
            for chunk in text.split(length):
                states = find_states(NeuralMemoryState, cache.states)
                ids = chunk[None].long().to(model.device)
                traces = model.model(ids, past_key_values=cache, output_trace=True).traces
                for memory, trace, state, parts in zip(memories, traces, states, found, strict=True):
                    gates = trace.forget, trace.momentum, memory.applied_step_size(trace, state)
                    parts.append(tuple(gate[0].cpu().double() for gate in gates))
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    return [
        _describe(rest[0, 0].cpu().double(), *(torch.cat(gate) for gate in zip(*parts, strict=True)))
        for rest, parts in zip(at_rest, found, strict=True)
    ]


def _describe(at_rest: Tensor, forget: Tensor, momentum: Tensor, step_size: Tensor) -> LayerGates:
    """Statistics of gates (tokens, heads, depth); at_rest (heads, depth) is forget for an input of zero."""
    half_life = _half_life(forget)
    return LayerGates(
        half_life_at_rest=_half_life(at_rest),
        half_life_10=_quantile(half_life, 0.1),
        half_life_median=_quantile(half_life, 0.5),
        half_life_90=_quantile(half_life, 0.9),
        momentum_mean=momentum.mean(0),
        step_size_median=_quantile(step_size, 0.5),
        write_strength_median=_quantile(step_size / (1 - momentum), 0.5),
    )


def _half_life(forget: Tensor) -> Tensor:
    """After how many such tokens half is left."""
    return math.log(2) / -torch.log1p(-forget)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The value at the nearest rank over dimension 0; to interpolate between two inf would give NaN."""
    return values.sort(0).values[round(share * (len(values) - 1))]
