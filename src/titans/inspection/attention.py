"""Which keys each token's attention reads, measured by gradients in a model's layers, not read off masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from titans.hf import TitansForCausalLM
from titans.nn.attention.full import FullAttention
from titans.nn.attention.segment import SegmentAttention
from titans.nn.attention.window import WindowAttention

Attention = FullAttention | SegmentAttention | WindowAttention
Kind = Literal["persistent", "context", "tokens"]
_COLOURS: dict[Kind, str] = {"persistent": "#8a8f98", "context": "#d9822b", "tokens": "#2b6cb0"}


@dataclass(frozen=True)
class SeenKeys:
    """What the queries of one attention layer read.

    seen: for each kind of key, (queries, keys) bool: persistent tokens, the context that the memory recalled
    (MAC), and the tokens themselves. Kinds that the layer does not have are missing.
    """

    layer: str
    seen: dict[Kind, np.ndarray]


def seen_keys(model: TitansForCausalLM, num_tokens: int) -> list[SeenKeys]:
    """Which keys the attention layers of a model read over one call of num_tokens.

    Every layer is called with random inputs as its block calls it, but with queries of 0, which give all keys
    that are visible the same weight and depend on no input. So a query reads a key if its output has a
    gradient with respect to what the key is made of. This takes a backward pass for each token and layer:
    two or three segments or windows are enough tokens.

    Returns:
        One for each attention layer, in order; none for a model without attention.

    Raises:
        ValueError: for fewer than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: give at least 1")
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            block = model.get_submodule(name.rpartition(".")[0])
            seen = _seen_by(module, getattr(block, "persistent", None), num_tokens)
            found.append(SeenKeys(name, seen))
    return found


def draw_seen_keys(path: Path, layers: Mapping[str, SeenKeys]) -> None:
    """Write a PNG: for each title a matrix of a layer's queries (rows) and the keys they read (columns)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    figure, axes = plt.subplots(
        1, len(layers), figsize=(3.6 * len(layers), 3.4), layout="constrained", squeeze=False
    )
    for axis, (title, layer) in zip(axes[0], layers.items(), strict=True):
        kinds = [kind for kind in _COLOURS if kind in layer.seen]
        drawn = np.concatenate([layer.seen[kind] * (1 + [*_COLOURS].index(kind)) for kind in kinds], 1)
        palette = ListedColormap(["#f4f4f2", *_COLOURS.values()])
        axis.imshow(drawn, cmap=palette, vmin=0, vmax=len(_COLOURS), aspect="auto", interpolation="nearest")
        borders = np.cumsum([0] + [layer.seen[kind].shape[1] for kind in kinds])
        for border in borders[1:-1]:
            axis.axvline(border - 0.5, color="#222", lw=0.8)
        axis.set_xticks((borders[1:] + borders[:-1] - 1) / 2, kinds, fontsize=8)
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.set_title(title, fontsize=10)
    axes[0][0].set_ylabel("queries, in order", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _seen_by(attention: Attention, persistent: Tensor | None, num_tokens: int) -> dict[Kind, np.ndarray]:
    """For each kind of key that a layer has, (queries, keys) bool."""
    projection = attention.qkv if isinstance(attention, FullAttention) else attention.query
    weight = projection.weight.detach()
    generator = torch.Generator().manual_seed(0)

    def made_of(num_keys: int) -> Tensor:
        random = torch.randn(num_keys, weight.shape[1], generator=generator)
        return random.to(weight).requires_grad_()

    sources: dict[Kind, Tensor] = {}
    if persistent is not None:
        sources["persistent"] = made_of(len(persistent))
    if isinstance(attention, SegmentAttention):
        sources["context"] = made_of(num_tokens)
    sources["tokens"] = made_of(num_tokens)
    with torch.enable_grad():
        attended = _without_queries(attention, **sources)
        gradients = [torch.autograd.grad(y.sum(), [*sources.values()], retain_graph=True) for y in attended]
    return {
        kind: np.stack([(gradient != 0).any(-1).cpu().numpy() for gradient in of_kind])
        for kind, of_kind in zip(sources, zip(*gradients, strict=True), strict=True)
    }


def _without_queries(
    attention: Attention, tokens: Tensor, context: Tensor | None = None, persistent: Tensor | None = None
) -> Tensor:
    """A layer's output (num_tokens, hidden_size) with queries of 0, of inputs of shape (…, hidden_size)."""
    x = tokens[None]
    if isinstance(attention, FullAttention):
        queries, others = attention.qkv.weight.tensor_split([attention.num_heads * attention.head_dim])
        weights = {"qkv.weight": torch.cat([torch.zeros_like(queries), others])}
        return functional_call(attention, weights, (x,))[0][0]
    weights = {"query.weight": torch.zeros_like(attention.query.weight)}
    if isinstance(attention, WindowAttention):
        return functional_call(attention, weights, (x,), {"persistent": persistent})[0][0]
    assert context is not None
    # MAC calls it once for each segment.
    parts = [part.split(attention.segment_length, 1) for part in (x, context[None])]
    segments = [
        functional_call(attention, weights, (*pair, persistent))[0] for pair in zip(*parts, strict=True)
    ]
    return torch.cat(segments, 1)[0]
