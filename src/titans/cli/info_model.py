"""What `titans info` says about a graft, and about a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BASE_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
)  # fmt: skip


def describe_graft(folder: Path, fields: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Window, memories and base of a graft, from its config.json.

    Args:
        parameters: how many numbers its memories' weights have.

    Raises:
        ValueError: for a damaged configuration.
    """
    from huggingface_hub.errors import StrictDataclassError

    from titans.hf.graft import GraftConfig

    try:
        config = GraftConfig.from_dict(fields)
        origin = config.origin
        about = {
            "kind": "graft",
            "path": str(folder),
            "base": origin["name"] or None,
            "base_class": origin["class"],
            "base_fingerprint": origin["weights"],
            **{name: value for name, value in origin["sizes"].items() if name != "model_type"},
        }
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is damaged or of another version ({error!r}): restore the file"
        ) from None
    return {
        **about,
        "window": config.window,
        "sinks": config.sinks,
        "memories": list(config.memories),
        "parameters": parameters,
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        **config.memories,
    }


def describe_model(folder: Path, fields: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Class and sizes of a model of transformers, from its config.json, which has no memory of this library.

    Args:
        parameters: how many numbers its weights have.
    """
    text = fields.get("text_config") if isinstance(fields.get("text_config"), dict) else fields
    return {
        "kind": "model",
        "path": str(folder),
        "model_type": fields.get("model_type"),
        "base_class": ", ".join(map(str, fields.get("architectures") or ())) or None,
        **{name: text[name] for name in _BASE_SIZES if text.get(name) is not None},
        "parameters": parameters,
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "memory": "none; titans.graft(model) or --graft gives it one",
    }
