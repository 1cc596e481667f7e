"""Models to try: small ones come with the library, each in a folder of its own with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.zoo.by_name import graft_names, names
from titans.zoo.checkpoint import load_checkpoint, load_config, load_titans
from titans.zoo.precision import Precision, set_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["graft_names", "load", "load_checkpoint", "load_config", "load_titans", "names"]


def load(
    name: str | Path,
    *,
    dtype: Precision | None = None,
    base: PreTrainedModel | str | Path | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model, ready to evaluate, and tokenizer: of a name in `names()` or `graft_names()`, "smollm2-135m", or
    a folder of `titans train`.

    A folder may also hold any other causal LM, as transformers' `save_pretrained` writes it, or a graft,
    whose base is found where it was, or among the downloaded models of the Hub.

    Args:
        dtype: precision of a model of transformers, or of a graft's base: "float32", "bfloat16", or "auto",
            which on a CPU is bfloat16 for large models if the processor has matrix tiles (Intel AMX), and
            float32 otherwise. By default "auto" for a graft, whose base is frozen, while other models, which
            may be trained, keep the one they were saved in, and so does a base that is given as a model.
            Memories and Titans models are in float32.
        base: of a graft, where it is no longer what the graft names, or was a model in memory: the model,
            which becomes part of the graft, or its folder or name.

    Raises:
        ImportError: without the extra `hf`; says how to install it.
        ValueError: if there is neither, or what is there is damaged; for another base than the graft was made
            on, or a base of what is no graft; for an unknown dtype, or bfloat16 of a Titans model.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"titans.load: {error}; pip install 'titans-ltm[hf]'", name=error.name) from None
    model, tokenizer = load_checkpoint(Path(name), base)
    own = base is None or isinstance(base, str | Path)
    if dtype is None and own and model.config.model_type == "titans-graft":
        dtype = "auto"
    if dtype is not None:
        set_precision(model, dtype)
    return model, tokenizer
