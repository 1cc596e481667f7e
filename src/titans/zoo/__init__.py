"""Models to try: small ones come with the library, each in a folder of its own with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.zoo.by_name import graft_names, names
from titans.zoo.checkpoint import load_checkpoint, load_config, load_titans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["graft_names", "load", "load_checkpoint", "load_config", "load_titans", "names"]


def load(name: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model, ready to evaluate, and tokenizer: of a name in `names()` or `graft_names()`, "smollm2-135m", or
    a folder of `titans train`.

    A folder may also hold any other causal LM, as transformers' `save_pretrained` writes it, or a graft,
    whose base is found where it was, or among the downloaded models of the Hub.

    Raises:
        ImportError: without the extra `hf`; says how to install it.
        ValueError: if there is neither, or what is there is damaged.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"titans.load: {error}; pip install 'titans-ltm[hf]'", name=error.name) from None
    return load_checkpoint(Path(name))
