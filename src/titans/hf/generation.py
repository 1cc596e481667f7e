"""Padding around `generate`: before the prompt's real tokens, and after the end of a row that ends early."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, StoppingCriteriaList

from titans.hf.cache import TitansCache


def note_ended_rows(
    criteria: StoppingCriteriaList, generation_config: GenerationConfig, cache: TitansCache | None
) -> StoppingCriteriaList:
    """The same criteria, noting in the cache which rows have ended: what follows in these is padding.

    Without an end token rows are not padded; and beams are no rows.
    """
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    if cache is None or not pads or (generation_config.num_beams or 1) > 1:
        return criteria
    return _Noting(criteria, cache)


class _Noting(StoppingCriteriaList):  # type: ignore[misc]
    def __init__(self, criteria: StoppingCriteriaList, cache: TitansCache) -> None:
        super().__init__(criteria)
        self.cache = cache
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)
        # The last token of a row is still a real one.
        self.cache.ended_rows, before = self.ended, self.ended
        self.ended = ended if before is None else before | ended
        return ended


def padding_first(mask: Tensor, begin: int) -> Tensor | None:
    """The order (rows, time) of columns in which each row ends with a real token; None if they do already.

    Args:
        mask: (rows, time), 0 for padding.
        begin: how many columns keep their place.

    Raises:
        ValueError: for a row without a real token.
    """
    real = mask[:, begin:].bool()
    if not bool(real.any(1).all()):
        row = int((~real.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask hides every token of row {row}: there is none to continue with")
    if bool(real[:, -1].all()):
        return None
    kept = torch.arange(begin, device=mask.device).expand(len(mask), -1)
    return torch.cat([kept, begin + torch.argsort(real.long(), dim=1, stable=True)], 1)


def with_prompt(found: Any, prompt: Tensor) -> Any:
    """What `generate` returned for a prompt in another order, the prompt as it was given."""
    sequences = found if isinstance(found, Tensor) else found.sequences
    repeats = len(sequences) // len(prompt)
    sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(repeats, 0)
    return found
