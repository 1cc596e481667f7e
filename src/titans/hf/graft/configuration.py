"""Configuration of a graft: its window, its memories, and the identity of its base."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from titans.hf.fingerprint import same_weights, weights_name, weights_sample
from titans.hf.graft.lora import lora_settings
from titans.hf.graft.memories import MEMORIES
from titans.hf.graft.window import Window
from titans.hf.known_fields import refuse_unknown

_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


def fields() -> tuple[str, ...]:
    """The names of what a graft's configuration has; of each memory its settings."""
    return ("window", "sinks", *MEMORIES, "lora", "origin")


class GraftConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a `GraftedForCausalLM` is made of.

    window, sinks: of `titans.graft`. For each memory, by its name in `MEMORIES`, its settings, None without
    it. lora: rank, alpha and targets of the low-rank changes of the base's linear layers, None without them.
    origin: identifies the base by its class, name, sizes, a hash of its weights and a sample of them.
    vocabulary: identifies the tokens of the tokenizer that the graft was saved with, if any.
    Unknown fields are an error. The configuration of a graft that exists cannot change.

    Raises:
        ValueError: for an unknown field, also of a memory, or a value outside its domain.
    """

    model_type = "titans-graft"

    def __init__(
        self,
        window: int = 512,
        sinks: int = 4,
        *,
        lora: dict[str, Any] | None = None,
        origin: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.window, self.sinks = window, sinks
        for name in MEMORIES:
            given = kwargs.pop(name, None)
            setattr(self, name, None if given is None else memory_settings(name, given))
        self.lora = None if lora is None else lora_settings(lora)
        self.origin = {} if not origin else _checked_origin(origin)
        self.vocabulary: str | None = kwargs.pop("vocabulary", None)
        # Sizes of the base, which transformers and `titans.stream` read from a configuration.
        sizes = {name: self.origin.get("sizes", {}).get(name) for name in _SIZES[1:]}
        for name, value in sizes.items():
            if (given := kwargs.pop(name, None)) not in (None, value):
                raise ValueError(f"{name}={given!r}, but the base in origin has {value!r}: leave {name} out")
        self.use_cache = kwargs.pop("use_cache", True)
        kwargs["tie_word_embeddings"] = False
        written = ("architectures", "transformers_version", "dtype", "tie_word_embeddings")
        refuse_unknown({name: kwargs[name] for name in kwargs if name not in written}, GraftConfig, fields())
        super().__init__(**kwargs, **sizes)
        Window(window, sinks)

    def __setattr__(self, key: str, value: Any) -> None:
        if self.__dict__.get("_of_graft") and key in fields() and value != getattr(self, key):
            raise ValueError(
                f"{key}={value!r}: a graft that exists keeps its {key}; make another one with "
                f"titans.graft(model, {key}=…) or from_pretrained(folder, {key}=…)"
            )
        super().__setattr__(key, value)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, which may change."""
        return {name: value for name, value in self.__dict__.items() if name != "_of_graft"}

    def keep(self) -> None:
        """From now on it is the configuration of a graft, whose fields cannot change."""
        self.__dict__["_of_graft"] = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from saved fields, and changes of them: `from_pretrained(folder, window=256)`.

        Raises:
            ValueError: for a field that is not known or outside its domain.
        """
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"config.json holds a {type(config_dict).__name__}, no object: restore the file")
        saved = {
            name: kind.from_saved(settings)
            for name, kind in MEMORIES.items()
            if isinstance(settings := config_dict.get(name), Mapping)
        }
        # The library would set them afterwards, unseen by any check, and drop those that it does not know.
        changes = {name: kwargs.pop(name) for name in fields() if name in kwargs}
        found = super().from_dict({**config_dict, **saved, **changes}, **kwargs)
        if not kwargs.get("return_unused_kwargs", False):
            unused = {name: value for name, value in kwargs.items() if not hasattr(found, name)}
            refuse_unknown(unused, GraftConfig, fields())
        return found

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it; what there is not is left out, as before it was known."""
        found: dict[str, Any] = super().to_dict()
        newer = ("vocabulary", "lora", *(name for name in MEMORIES if name != "adaptation"))
        absent = {name for name in newer if found.get(name) is None}
        return {name: value for name, value in found.items() if name not in {*absent, "_of_graft"}}

    @property
    def memories(self) -> dict[str, dict[str, Any]]:
        """The settings of the memories that the graft has, by name."""
        return {name: found for name in MEMORIES if (found := getattr(self, name)) is not None}

    @property
    def has_memory(self) -> bool:
        """Whether the graft has a memory that learns during reading."""
        return bool(self.memories)

    @property
    def changes_base(self) -> bool:
        """Whether the base's own states differ in the graft, by residual branches or low-rank changes."""
        return getattr(self, "residual", None) is not None or self.lora is not None

    def state_fields(self) -> dict[str, Any]:
        """The fields that must be equal for one graft to continue from another's state."""
        found = {
            "model_type": self.model_type,
            "base": self.origin.get("sizes", {}).get("model_type"),
            **{name: self.origin.get("sizes", {}).get(name) for name in _SIZES[1:]},
            "window": self.window,
            "sinks": self.sinks,
        }
        for name, kind in MEMORIES.items():
            found |= kind.state_fields(getattr(self, name))
        return found


def memory_settings(memory: str, given: Any, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings of a memory but its sizes, so that a saved graft does not depend on defaults; lists for
    tuples, as JSON has them.

    Args:
        memory: its name in `MEMORIES`.
        measured: of the base, where they are not given.

    Raises:
        ValueError: for one that there is not, or one without a default that is not given.
    """
    known = MEMORIES[memory].defaults()
    names = list(known)
    if not isinstance(given, Mapping):
        raise ValueError(f"{memory}={given!r}: give its settings as a dict of {', '.join(names)}")
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{memory} has no setting {unknown[0]!r}: it has {', '.join(names)}")
    settings = {**known, **(measured or {}), **given}
    if missing := [name for name, value in settings.items() if value is inspect.Parameter.empty]:
        raise ValueError(f"{memory} lacks {missing[0]}: make a graft with titans.graft(base)")
    return {name: _as_lists(value) for name, value in settings.items()}


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def _checked_origin(origin: Any) -> dict[str, Any]:
    texts = ("class", "name", "weights", "sample")
    if isinstance(origin, Mapping) and isinstance(sizes := origin.get("sizes"), Mapping):
        complete = origin.keys() == {*texts, "sizes"} and sizes.keys() == {*_SIZES}
        if complete and all(isinstance(origin[name], str) for name in texts if name != "name"):
            return dict(origin)
    raise ValueError("origin does not describe a base: give what titans.graft wrote")


def origin_of(base: PreTrainedModel) -> dict[str, Any]:
    """The fields by which a saved graft finds and identifies its base."""
    text, name = base.config.get_text_config(decoder=True), base.name_or_path or base.config.name_or_path
    return {
        "class": type(base).__name__,
        "name": str(Path(name).absolute()) if name and Path(name).is_dir() else name,
        "sizes": {name: getattr(text, name, None) for name in _SIZES},
        "weights": weights_name(base),
        "sample": weights_sample(base),
    }


def check_origin(base: PreTrainedModel, origin: dict[str, Any]) -> None:
    """Check that a base is the one that a graft was made on; its precision may differ.

    Raises:
        ValueError: naming the first thing that differs.
    """
    if not origin:
        raise ValueError("the configuration states no base: make a graft with titans.graft(base)")
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
