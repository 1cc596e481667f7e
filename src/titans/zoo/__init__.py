"""Models to try: small ones come with the library, each in a folder of its own with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from titans.zoo.checkpoint import load_checkpoint, load_config, names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.hf import TitansForCausalLM

__all__ = ["load", "load_checkpoint", "load_config", "names"]


def load(name: str | Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """Model, ready to evaluate, and tokenizer: of a name in `names()`, or of a folder of `titans train`.

    Raises:
        ValueError: if there is neither, or what is there is damaged.
    """
    return load_checkpoint(Path(name))
