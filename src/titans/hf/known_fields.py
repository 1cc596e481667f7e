"""Names that are no field of a configuration are an error, and the error says what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from titans.hf.flat_config import remedy

# What the library itself hands to a configuration in addition to its fields.
_LIBRARY_KEYS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "tokenizer_class", "torch_dtype", "use_cache",
}  # fmt: skip


def refuse_unknown(
    values: Mapping[str, Any], kind: type[PreTrainedConfig], fields: Sequence[str] | None = None
) -> None:
    """Raise ValueError for a name that is neither one of the library nor a field.

    Args:
        values: what is left when those of the configuration itself are taken out.
        fields: the names to choose from; by default those that the class annotates.
    """
    known = _LIBRARY_KEYS | GenerationConfig._get_default_generation_params().keys()
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if unknown:
        own = sorted(kind.__annotations__ if fields is None else fields)
        advice = remedy(unknown[0]) or f"choose from {own}"
        raise ValueError(f"{unknown[0]}={values[unknown[0]]!r} is not a field of {kind.__name__}: {advice}")
