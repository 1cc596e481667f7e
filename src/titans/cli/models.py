"""The model that a command reads with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from titans.zoo.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def open_model(checkpoint: Path, graft: bool) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint.

    Args:
        graft: give it a sliding window and an adaptation, as `titans.graft` does.

    Raises:
        ValueError: for a checkpoint that cannot be opened, or a model that cannot be grafted.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    if graft:
        from titans.hf.graft import graft as grafted

        model = grafted(model, tokenizer)
    return model, tokenizer
