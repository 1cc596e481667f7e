"""The model that a command reads with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from titans.cli.terminal import report

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from titans.stream import Session

# Products of smaller models are too short for the precision to matter.
_LARGE = 20_000_000


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of a command that reads with any model."""

    graft: bool = False
    """Give a model of transformers a sliding window, for texts of any length, and a memory that learns
    during reading."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of a model of transformers on a CPU. auto: bfloat16 for large models if the processor has
    matrix tiles, which makes reading about twice as fast, and float32 otherwise."""

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


def set_precision(model: PreTrainedModel, dtype: str) -> None:
    """Convert a model of transformers, or a graft's base, to a precision of `ModelOptions`; says what auto
    chose, if it changed anything. Titans models and models on a GPU keep theirs under auto.

    Raises:
        ValueError: for another precision than float32 of a Titans model.
    """
    import torch

    if model.config.model_type == "titans":
        if dtype == "bfloat16":
            raise ValueError("dtype=bfloat16: a Titans model computes in float32; leave it out")
        return
    base: Any = model.base if model.config.model_type == "titans-graft" else model
    if dtype != "auto":
        base.to(getattr(torch, dtype))
        return
    if base.device.type != "cpu" or base.num_parameters() < _LARGE:
        return
    tiles = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    wanted = torch.bfloat16 if tiles else torch.float32
    if base.dtype != wanted:
        name = str(wanted).removeprefix("torch.")
        reason = "has matrix tiles" if tiles else "has no matrix tiles"
        report(f"precision: {name}, because this processor {reason}; --dtype sets another")
        base.to(wanted)
