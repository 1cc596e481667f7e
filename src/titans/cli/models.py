"""The model that a command reads with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titans.cli.terminal import report
from titans.zoo.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from titans.stream import Session


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of a command that reads with any model."""

    graft: bool = False
    """Give a model of transformers a sliding window, for texts of any length, and a memory that learns
    during reading."""
    dtype: Precision = "auto"
    """Precision of a model of transformers on a CPU. auto: bfloat16 for large models if the processor has
    matrix tiles, which makes reading more than twice as fast, and float32 otherwise."""

    def open_model(self, checkpoint: Path) -> tuple[Any, PreTrainedTokenizerBase]:
        """Model and tokenizer of a checkpoint.

        Raises:
            ValueError: for a checkpoint that cannot be opened, or a model that cannot be grafted.
        """
        from titans.zoo.checkpoint import load_checkpoint

        model, tokenizer = load_checkpoint(checkpoint)
        set_precision(model, self.dtype)
        if self.graft:
            from titans.hf.graft import graft

            model = graft(model, tokenizer)
        return model, tokenizer


def open_session(model: Any, tokenizer: PreTrainedTokenizerBase, memory: Path | None) -> Session:
    """A session that continues from a memory file, or a new one, in which the tokens are read that the
    tokenizer puts before every text.

    Raises:
        ValueError: for a memory that cannot be loaded or is another model's.
    """
    from titans.stream import Session
    from titans.stream.tokenizer import leading_tokens

    if memory is not None:
        return Session.load(memory, model, tokenizer)
    session = Session(model, tokenizer)
    session.feed(leading_tokens(tokenizer))
    return session


def set_precision(model: Any, precision: Precision) -> None:
    """Convert a model as `titans.zoo.precision` does, and say what auto chose, if it changed anything."""
    from titans.zoo import precision as of_zoo

    if choice := of_zoo.set_precision(model, precision):
        report(f"precision: {choice}; --dtype sets another")
