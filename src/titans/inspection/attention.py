"""Which keys each token's attention reads, measured by gradients in a running model, not read off masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from titans.hf import TitansForCausalLM
from titans.nn.attention.full import FullAttention
from titans.nn.attention.segment import SegmentAttention
from titans.nn.attention.window import WindowAttention

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

    A query reads a key if its attention output has a gradient with respect to the key's projection, all other
    paths between the two being cut. This takes a backward pass for each token and layer, so that two or three
    segments or windows are enough tokens.

    Returns:
        One for each attention layer, in order; none for a model without attention.

    Raises:
        ValueError: for fewer than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: give at least 1")
    found = []
    ids = (torch.arange(num_tokens, device=model.device) % model.config.vocab_size)[None]
    for name, module in model.named_modules():
        if not isinstance(module, (FullAttention, SegmentAttention, WindowAttention)):
            continue
        with _projections(module) as (keys, outputs), torch.enable_grad():
            model(ids, use_cache=False)
            queries = torch.cat(outputs, 1)[0].flatten(1).sum(1)
            rows = [_read_by(query, keys) for query in queries]
        found.append(SeenKeys(name, {kind: np.stack([row[kind] for row in rows]) for kind in rows[0]}))
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


def _read_by(query: Tensor, keys: list[tuple[Kind, Tensor]]) -> dict[Kind, np.ndarray]:
    """Which keys of each kind one query's output, a scalar, depends on, (keys,) bool each."""
    leaves = [leaf for _, leaf in keys]
    gradients = torch.autograd.grad(
        query, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    read: dict[Kind, list[np.ndarray]] = {}
    for (kind, _), gradient in zip(keys, gradients, strict=True):
        read.setdefault(kind, []).append((gradient.flatten(0, -2) != 0).any(-1).cpu().numpy())
    return {kind: np.concatenate(parts) for kind, parts in read.items()}


@contextmanager
def _projections(
    module: FullAttention | SegmentAttention | WindowAttention,
) -> Iterator[tuple[list[tuple[Kind, Tensor]], list[Tensor]]]:
    """What keys and values are made of within this block, cut off from what made it, and what is attended."""
    keys: list[tuple[Kind, Tensor]] = []
    outputs: list[Tensor] = []

    def cut(_: Any, arguments: tuple[Tensor], projected: Tensor) -> Tensor:
        leaf = projected.detach().requires_grad_()
        if arguments[0].dim() == 2:
            keys.append(("persistent", leaf))
        else:
            # The tokens of a stretch come at once, what is recalled for them segment by segment.
            seen_tokens = any(kind == "tokens" for kind, _ in keys)
            keys.append(("context" if seen_tokens else "tokens", leaf))
        return leaf

    projection = module.qkv if isinstance(module, FullAttention) else module.key_value
    hooks = [
        projection.register_forward_hook(cut),
        module.output.register_forward_pre_hook(lambda _, arguments: outputs.append(arguments[0])),
    ]
    try:
        yield keys, outputs
    finally:
        for hook in hooks:
            hook.remove()
