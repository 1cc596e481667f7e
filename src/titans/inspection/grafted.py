"""What a graft's memory gains in prediction, token by token, over its base in the same window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.evaluate.perplexity import TokenIds
from titans.hf import GraftCache, GraftedForCausalLM
from titans.stream.model import reading
from titans.stream.text import token_ids

# Why a text cannot be compared from a memory on.
BASE_UNKNOWN = (
    "this graft changes its base's own states (residual or lora), so that the window in a memory is not the "
    "one that its base alone would have, which only reading all of the text gives"
)
# Tokens read in one call.
PIECE_LENGTH = 256
POSITIONS = (0, 512, 2048, 8192)


@dataclass(frozen=True)
class LossAt:
    """Mean loss in nats per token over the tokens that stand at begin to end − 1 of a text.

    loss: with the memory. base: of the base in the same window. end: None for the rest of the text.
    association: with the association alone; None unless the graft has an adaptation, too.
    """

    begin: int
    end: int | None
    tokens: int
    loss: float
    base: float
    association: float | None = None

    @property
    def gain(self) -> float:
        """The share of the base's loss that the memory saves."""
        return 1 - self.loss / self.base


@dataclass(frozen=True)
class GraftInspection:
    """Arrays over the n tokens of a text, float32 but for the ids; NaN at the first token.

    ids: (n,). loss: (n,), nats of each token as the graft predicts it, whose memory has learned from the text
    before it. base: (n,), the same of the base, which sees the same window and has no memory. association:
    (n,), the same with the association alone, of a graft that has an adaptation, too; otherwise None.
    """

    ids: np.ndarray
    loss: np.ndarray
    base: np.ndarray
    association: np.ndarray | None = None

    @property
    def helped(self) -> np.ndarray:
        """(n,), gain in nats per token."""
        return self.base - self.loss

    def whole(self) -> LossAt:
        """Over the whole text."""
        return self._between(0, None)

    def by_position(self, begins: tuple[int, ...] = POSITIONS) -> list[LossAt]:
        """Over parts of the text that begin at these tokens; parts that the text does not reach are left
        out."""
        ends = (*begins[1:], None)
        reached = [part for part in zip(begins, ends, strict=True) if part[0] < len(self.ids) - 1]
        return [self._between(begin, end) for begin, end in reached]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, NaN as None, and the means by position."""
        lists = {
            name: [None if np.isnan(x) else x for x in values.tolist()]
            for name, values in self._losses().items()
        }
        parts = [asdict(part) | {"gain": part.gain} for part in self.by_position()]
        return {"ids": self.ids.tolist(), **lists, "by_position": parts}

    def _between(self, begin: int, end: int | None) -> LossAt:
        # The first token is predicted by nothing.
        part = slice(max(begin, 1), end)
        means = (float(values[part].mean(dtype=np.float64)) for values in self._losses().values())
        return LossAt(begin, end, len(self.ids[part]), *means)

    def _losses(self) -> dict[str, np.ndarray]:
        """What was measured, by name."""
        found = {"loss": self.loss, "base": self.base}
        return found if self.association is None else {**found, "association": self.association}


class GraftReading:
    """Reads a text piece by piece, at constant memory.

    Both losses come from the same hidden states. Where the graft changes these inside its base, the base
    reads the text once more, without the changes.

    cache: what was read; it changes with every piece.

    Args:
        cache: the state before the text, one row; it is not changed.
        beginning: ids that are read before the text and not shown, such as a tokenizer puts there.

    Raises:
        ValueError: for a graft without a memory, or a cache of one that changes its base inside.
    """

    def __init__(
        self, model: GraftedForCausalLM, cache: GraftCache | None = None, beginning: Iterable[int] = ()
    ) -> None:
        if not model.config.has_memory:
            raise ValueError("this graft has no memory to inspect: make it with adaptation=True")
        inside, self._window = model.config.changes_base, None
        if inside and cache is not None:
            raise ValueError(
                f"cache: {BASE_UNKNOWN}: leave it out, and inspect one text that begins with what it has read"
            )
        self._names = ["loss", "base"]
        if model.config.adaptation is not None and model.config.association is not None and not inside:
            self._names.append("association")
        self.model = model
        self.cache = model.empty_cache() if cache is None else cache.clone()
        # What was predicted from the token before, by name.
        nothing = torch.full((1, model.config.vocab_size), torch.nan)
        self._before = dict.fromkeys(self._names, nothing)
        if first := [int(token) for token in beginning]:
            with reading(model):
                ids = torch.tensor([first], device=model.device)
                model(ids, past_key_values=self.cache, logits_to_keep=1)
                if inside:
                    _, self._window = model.read_base(ids)

    def read(self, ids: Tensor) -> GraftInspection:
        """Read on: (n,) int64 ids; the logits of all of them are held, once for each loss."""
        config, given = self.model.config, ids[None].to(self.model.device)
        with reading(self.model):
            output = self.model(
                given,
                past_key_values=self.cache,
                output_surprise=True,
                output_base_logits=not config.changes_base,
            )
            base_logits = output.base_logits
            if base_logits is None:
                base_logits, self._window = self.model.read_base(given, self._window)
        found = {"loss": output.logits, "base": base_logits, "association": output.association_logits}
        losses = {}
        for name in self._names:
            logits = torch.cat([self._before[name], found[name][0].float().cpu()])
            losses[name] = F.cross_entropy(logits[:-1], ids, reduction="none")
            self._before[name] = logits[-1:].clone()
        if config.adaptation is not None and config.association is None:
            # The loss that the adaptation learned from: exact where logits are rounded to half precision.
            base, loss = losses["base"], output.surprises[-1][0, :, 0].float().cpu()
            losses["loss"] = torch.where(base.isnan(), base, loss)
        return GraftInspection(ids.numpy(), **{name: loss.numpy() for name, loss in losses.items()})


def inspect_graft(
    model: GraftedForCausalLM,
    ids: TokenIds,
    *,
    cache: GraftCache | None = None,
    beginning: Iterable[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> GraftInspection:
    """Read a text with and without a graft's memory.

    Args:
        ids: token ids (n,) of the text.
        cache, beginning: of `GraftReading`.
        progress: called with the number of tokens read so far and in all.

    Raises:
        ValueError: for a graft without a memory, fewer than two tokens, or foreign token ids.
    """
    text = token_ids(ids, None, model.config.vocab_size).long()
    if len(text) < 2:
        raise ValueError(f"the text holds {len(text)} token(s): give two or more")
    reader, parts, done = GraftReading(model, cache, beginning), [], 0
    for piece in text.split(PIECE_LENGTH):
        parts.append(reader.read(piece))
        done += len(piece)
        if progress is not None:
            progress(done, len(text))
    return joined(parts)


def joined(parts: Sequence[GraftInspection]) -> GraftInspection:
    """Pieces of one text as a whole."""
    names = ["ids", *parts[0]._losses()]
    return GraftInspection(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )
