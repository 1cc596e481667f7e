"""Does what was read into the memory help later? One text, several pasts, and nothing but the memory between
them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.evaluate import keep_memory_only
from titans.hf import TitansCache, TitansForCausalLM
from titans.stream.model import reading

PIECE_LENGTH = 1024


@dataclass(frozen=True)
class Recollection:
    """Bits per byte of one text after different pasts.

    arms: what was read before. bits_per_byte: one number for each. curve: (arms, pieces), over pieces of
        1024 bytes.
    """

    arms: tuple[str, ...]
    bits_per_byte: tuple[float, ...]
    curve: np.ndarray


def shuffled_lines(text: bytes, seed: int) -> bytes:
    """The same lines in another order."""
    lines = text.splitlines(keepends=True)
    order = np.random.default_rng(seed).permutation(len(lines))
    return b"".join(lines[i] for i in order)


def recollect(
    model: TitansForCausalLM,
    pasts: dict[str, bytes],
    text: bytes,
    progress: Callable[[int, int], None] | None = None,
) -> Recollection:
    """Read each past into a memory of its own, empty everything else, then predict the text from each.

    Every arm goes on learning while it reads the text, and begins it with empty attention and convolutions.
    An empty past is a model that has read nothing. Pasts are cut at the end to the length of the shortest
    that is not empty.
    """
    filled = [name for name, past in pasts.items() if past]
    length = min(len(pasts[name]) for name in filled)
    total = length + len(text)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    with reading(model):
        before = _ids([pasts[name][:length] for name in filled], model)
        cache = TitansCache(model.config)
        for begin in range(0, length, PIECE_LENGTH):
            model(before[:, begin : begin + PIECE_LENGTH], past_key_values=cache, logits_to_keep=1)
            report(begin)
        cache = _with_fresh_rows(model, keep_memory_only(model, cache), len(pasts) - len(filled))
        arms = filled + [name for name, past in pasts.items() if not past]

        ids = _ids([text] * len(arms), model)
        losses = []
        for begin in range(0, len(text) - 1, PIECE_LENGTH):
            piece = ids[:, begin : begin + PIECE_LENGTH + 1]
            logits = model(piece[:, :-1], past_key_values=cache).logits
            losses.append(F.cross_entropy(logits.transpose(1, 2), piece[:, 1:], reduction="none"))
            report(length + begin)
    curve = torch.stack([loss.mean(1) for loss in losses], 1) / math.log(2)
    means = torch.cat(losses, 1).mean(1) / math.log(2)
    order = [arms.index(name) for name in pasts]
    return Recollection(tuple(pasts), tuple(means[order].tolist()), curve[order].numpy())


def _ids(rows: list[bytes], model: TitansForCausalLM) -> Tensor:
    return torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in rows]).astype(np.int64)).to(
        model.device
    )


def _with_fresh_rows(model: TitansForCausalLM, cache: TitansCache, count: int) -> TitansCache:
    """The cache with rows added that have read nothing."""
    joined = TitansCache(model.config)
    states = []
    for layer, state in zip(model.model.layers, cache.states or (), strict=True):
        fresh = layer.initial_state(count)
        states.append(pytree.tree_map(lambda a, b: torch.cat([a, b]), state, fresh))
    joined.store(tuple(states), 0)
    return joined
