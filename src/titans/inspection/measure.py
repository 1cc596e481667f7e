"""Surprise and gates of a memory at each token of a text, and how far the memory helps to predict it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.evaluate.memory import keep_memory_only
from titans.evaluate.perplexity import TokenIds
from titans.hf import TitansCache, TitansForCausalLM
from titans.state import stacked
from titans.stream.model import reading
from titans.stream.reader import initial_states
from titans.stream.text import token_ids

PASSAGE_LENGTH = 1024


@dataclass(frozen=True)
class Inspection:
    """Arrays over the n tokens of a text, float32 but for the ids.

    ids: (n,). surprise: (n, layers), ‖M(k) − v‖² before the token is written, which is what its write
    descends, mean over heads; layers are those with a memory. forget, step_size: (n, layers, heads), the
    gates, mean over the layers of a head's network. memory_norm: (passages, layers, heads), Frobenius norm of
    the fast weights at the end of each passage. Of a layer with local memories all are the global one's.

    loss: (n,), nats of each token, read in one stream; NaN at the first. own, other, none: (n,), the same
    with each passage read by itself, attention and filters empty at its beginning, from the memory that the
    text before it left, that as much of another text left, and none; NaN at the first of each passage.
    """

    ids: np.ndarray
    surprise: np.ndarray
    forget: np.ndarray
    step_size: np.ndarray
    memory_norm: np.ndarray
    loss: np.ndarray
    own: np.ndarray
    other: np.ndarray
    none: np.ndarray
    passage_length: int

    @property
    def helped(self) -> np.ndarray:
        """(n,), gain in nats per token of the text's memory over none."""
        return self.none - self.own

    @property
    def helped_over_another(self) -> np.ndarray:
        """(n,), gain in nats per token over another text's memory: the effect of this text in particular."""
        return self.other - self.own

    def to_json(self) -> dict[str, Any]:
        """Plain lists, NaN as None."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                plain = value.astype(object)
                plain[np.isnan(value)] = None
                value = plain
            found[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return found


def inspect_text(
    model: TitansForCausalLM,
    ids: TokenIds,
    another: TokenIds,
    *,
    cache: TitansCache | None = None,
    passage_length: int = PASSAGE_LENGTH,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Read a text at constant memory, and each of its passages three times more.

    Args:
        ids: token ids (n,) of the text.
        another: token ids of the text to compare with, best of the same kind. Where it is shorter, its memory
            stays unchanged after its end.
        cache: the state before the text, one row; it is not changed.
        passage_length: tokens of a passage.
        progress: called with the number of tokens read so far and in all.

    Raises:
        ValueError: for a model without a memory, texts of fewer than two tokens, or foreign token ids.
    """
    if not model.config.has_memory:
        raise ValueError(f"variant={model.config.variant!r} has no memory to inspect")
    text, compared = (token_ids(each, None, model.config.vocab_size).long() for each in (ids, another))
    for name, read in (("ids", text), ("another", compared)):
        if len(read) < 2:
            raise ValueError(f"{name} holds {len(read)} token(s): give two or more")
    with reading(model):
        fresh = TitansCache(model.config)
        fresh.store(initial_states(model), 0)
        own, other = (fresh if cache is None else cache).clone(), fresh.clone()
        parts: list[dict[str, Tensor]] = []
        logits = torch.full((1, model.config.vocab_size), torch.nan)
        for begin in range(0, len(text), passage_length):
            passage = text[begin : begin + passage_length]
            views = [keep_memory_only(model, held) for held in (own, other, fresh)]
            found, logits = _stream(model, passage, own, logits)
            found |= dict(zip(("own", "other", "none"), _views(model, passage, views), strict=True))
            parts.append(found)
            if len(piece := compared[begin : begin + passage_length]):
                model(piece[None].to(model.device), past_key_values=other, logits_to_keep=1)
            if progress is not None:
                progress(min(begin + passage_length, len(text)), len(text))
    joined = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return Inspection(ids=text.numpy(), passage_length=passage_length, **joined)


def _stream(
    model: TitansForCausalLM,
    passage: Tensor,
    cache: TitansCache,
    before: Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """Read on: what was seen, and the logits (1, vocab) after the last token."""
    output = model(passage[None].to(model.device), past_key_values=cache, output_trace=True)
    logits = torch.cat([before, output.logits[0].float().cpu()])
    traces = output.traces
    found = {
        "surprise": torch.stack([trace.surprise[0].float().mean(-1) for trace in traces], -1),
        "forget": torch.stack([trace.forget[0].mean(-1) for trace in traces], 1),
        "step_size": torch.stack([trace.step_size[0].mean(-1) for trace in traces], 1),
        "memory_norm": torch.stack([trace.weight_norm[0] for trace in traces])[None],
        "loss": F.cross_entropy(logits[:-1], passage, reduction="none"),
    }
    if before.isnan().any():
        found["loss"][0] = torch.nan
    return {name: value.float().cpu() for name, value in found.items()}, logits[-1:]


def _views(model: TitansForCausalLM, passage: Tensor, views: list[TitansCache]) -> Tensor:
    """The passage's losses (views, n) from several memories, NaN at its first token."""
    together = TitansCache(model.config)
    together.store(stacked([view.states for view in views]), 0)
    rows = passage.expand(len(views), -1)
    losses = torch.full(rows.shape, torch.nan)
    if len(passage) > 1:
        logits = model(rows[:, :-1].to(model.device), past_key_values=together).logits.float().cpu()
        losses[:, 1:] = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses
