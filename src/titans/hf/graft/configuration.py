"""Configuration of a graft: its window, its memories, and which base it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from titans.hf.fingerprint import same_weights, weights_name, weights_sample
from titans.hf.graft.window import Window

_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


class GraftConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a `GraftedForCausalLM` is made of.

    window, sinks: of `titans.graft`. adaptation: settings of the memory that learns by the model's own loss,
    None without it. origin: the base: its class, name, sizes, a name of its weights and a sample of them.
    """

    model_type = "titans-graft"

    def __init__(
        self,
        window: int = 512,
        sinks: int = 4,
        adaptation: dict[str, Any] | None = None,
        origin: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.window, self.sinks = window, sinks
        self.adaptation = None if adaptation is None else dict(adaptation)
        self.origin = {} if origin is None else dict(origin)
        # Of the base, and read by the library and by streams.
        sizes = self.origin.get("sizes", {})
        for name in _SIZES[1:]:
            kwargs.setdefault(name, sizes.get(name))
        kwargs["tie_word_embeddings"] = False
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)
        Window(window, sinks)

    @property
    def has_memory(self) -> bool:
        """Whether anything in it learns while it reads."""
        return self.adaptation is not None

    def state_fields(self) -> dict[str, Any]:
        """What two grafts must share to understand each other's states."""
        sizes = {name: self.origin.get("sizes", {}).get(name) for name in _SIZES[1:]}
        chunk_size = None if self.adaptation is None else self.adaptation.get("chunk_size")
        return {
            "model_type": self.model_type,
            "base": self.origin.get("sizes", {}).get("model_type"),
            **sizes,
            "window": self.window,
            "sinks": self.sinks,
            "adaptation": self.adaptation is not None,
            "chunk_size": chunk_size,
        }


def origin_of(base: PreTrainedModel) -> dict[str, Any]:
    """What is written of a base, by which it is found and recognised."""
    text, name = base.config.get_text_config(decoder=True), base.name_or_path or base.config.name_or_path
    return {
        "class": type(base).__name__,
        "name": str(Path(name).absolute()) if name and Path(name).is_dir() else name,
        "sizes": {name: getattr(text, name, None) for name in _SIZES},
        "weights": weights_name(base),
        "sample": weights_sample(base),
    }


def check_origin(base: PreTrainedModel, origin: dict[str, Any]) -> None:
    """Whether a base is the one that a graft was made on, in whatever precision.

    Raises:
        ValueError: naming the first thing that differs.
    """
    found = {"class": type(base).__name__}
    text = base.config.get_text_config(decoder=True)
    found |= {name: getattr(text, name, None) for name in _SIZES}
    for name, value in {"class": origin["class"], **origin["sizes"]}.items():
        if found.get(name) != value:
            raise ValueError(
                f"base has {name}={found.get(name)!r}, the graft was made on {value!r}: give the same model"
            )
    name, sample = origin["weights"], origin["sample"]
    if weights_name(base) != name and not same_weights(base, name, sample):
        raise ValueError(
            f"base is a {type(base).__name__} of the right sizes with other weights than the graft was made "
            "on: give the same checkpoint"
        )
