"""The configuration of a Titans model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from titans.hf.flat_config import nested, remedy
from titans.hf.known_fields import refuse_unknown
from titans.hf.memory_configuration import TitansMemoryConfig, changed_memory
from titans.hf.presets import PRESETS
from titans.nn.blocks import BLOCKS, BlockSettings, has_memory
from titans.nn.memory import features as feature_maps
from titans.nn.memory.caching import Caching

# How the library names the kind of a layer, for the parts of it that want to know.
_LAYER_TYPES = {
    "lmm": "linear_attention",
    "hope": "linear_attention",
    "lstm": "linear_attention",
    "rwkv7": "linear_attention",
    "transformer": "full_attention",
    "window": "sliding_attention",
}


@strict
class TitansConfig(PreTrainedConfig):
    """Sizes and choices of a Titans model; unknown fields are an error.

    Args:
        variant: "mac", "mag", "mal", "lmm", "hope", or a baseline without a memory: "transformer", "window",
            whose attention sees a window, "lstm" or "rwkv7".
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: as in any language model.
        num_attention_heads, head_dim: heads of the attention and of the memory.
        memory_depth, memory_expansion: fast matrices of a head's memory, 1 for a linear one, and the hidden
            width of a deeper one over head_dim.
        memory: a `TitansMemoryConfig` or a dict of its fields, such as {"form": "recall"}.
        chunk_size: tokens that share one set of gradient weights; part of the model, not a speed knob.
        segment_length: tokens in a segment of attention ("mac").
        sliding_window: tokens a token attends to, itself included ("mag", "mal", "window").
        num_persistent_tokens: learned tokens per layer.

    Raises:
        ValueError: for an unknown field or a value outside its domain.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values", "memory_states"]
    sub_configs_defaults = {"memory": SubConfigSpec(TitansMemoryConfig)}

    variant: str = "mac"
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int = 64
    memory_depth: int = 1
    memory_expansion: int = 4
    memory: Any = None
    chunk_size: int = 16
    segment_length: int = 512
    sliding_window: int = 2048
    num_persistent_tokens: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __setattr__(self, key: str, value: Any) -> None:
        # Also where fields are set later, one by one or by `update`.
        if key == "memory" and isinstance(value, Mapping):
            value = TitansMemoryConfig(**value)
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown(kwargs, TitansConfig)
        if self.memory is None:
            self.memory = TitansMemoryConfig()
        # Once more than the library does, which would wrap the reason in an error of its own kind.
        self.validate_architecture()
        if self.layer_types is None:
            kind = _LAYER_TYPES.get(self.variant, "hybrid_sliding")
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # As the library does when it loads a model.
        self.memory.dtype = self.dtype

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from saved fields, and changes of them: `from_pretrained(folder, chunk_size=32)`.

        Of `memory={…}` only the fields given are changed, and of its form, unless that is given by name.
        Configurations saved before the memory had one of its own are translated.

        Raises:
            ValueError: for a field that is not known or outside its domain.
        """
        # The library would set them afterwards, unseen by any check, and drop those that it does not know.
        changes = {name: kwargs.pop(name) for name in [*kwargs] if name in TitansConfig.__annotations__}
        if changes.keys() & {"variant", "num_hidden_layers"}:
            changes.setdefault("layer_types", None)
        # The Auto classes would pass these on to the model.
        refuse_unknown({name: value for name, value in kwargs.items() if remedy(name)}, TitansConfig)
        saved = nested(config_dict)
        if saved.keys() != config_dict.keys():
            # Two layers were the default as long as fields of the memory were flat.
            saved.setdefault("memory_depth", 2)
        if isinstance(changes.get("memory"), Mapping):
            changes["memory"] = changed_memory(saved.get("memory"), changes["memory"])
        found = super().from_dict({**saved, **changes}, **kwargs)
        if not kwargs.get("return_unused_kwargs", False):
            unused = {name: value for name, value in kwargs.items() if not hasattr(found, name)}
            refuse_unknown(unused, TitansConfig)
        return found

    def validate_architecture(self) -> None:
        """Called by the library too, whenever a configuration is made, saved or loaded."""
        if self.variant not in BLOCKS:
            raise ValueError(f"variant={self.variant!r}: choose one of {sorted(BLOCKS)}")
        for name, kind in TitansConfig.__annotations__.items():
            value = getattr(self, name)
            if kind == "bool" and type(value) is not bool:
                raise ValueError(f"{name}={value!r}: give True or False")
            least = 0 if name == "num_persistent_tokens" else 1
            if kind == "int" and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
            if kind == "float" and (type(value) not in (int, float) or not 0 <= value < math.inf):
                raise ValueError(f"{name}={value!r}: give a finite number of at least 0")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions need an even number")
        if not self.rope_theta or not self.rms_norm_eps:
            raise ValueError(
                f"rope_theta={self.rope_theta}, rms_norm_eps={self.rms_norm_eps}: give numbers above 0"
            )
        if not isinstance(self.memory, TitansMemoryConfig):
            raise ValueError(f"memory={self.memory!r}: give a TitansMemoryConfig or a dict of its fields")
        if self.has_memory and self.memory.features != feature_maps.IDENTITY and self.memory_depth != 1:
            raise ValueError(
                f"memory_depth={self.memory_depth} with memory.features={self.memory.features!r}: what "
                "learns is one matrix on the features; give memory_depth=1, or memory.features='identity'"
            )
        caching, sizes = self.memory.caching, self.memory.local_chunk_sizes
        if self.variant == "hope" and (caching is not None or sizes is not None):
            name = "local_chunk_sizes" if caching is None else "caching"
            raise ValueError(
                f"memory.{name}={getattr(self.memory, name)!r} with variant='hope': its memories have no "
                "such schedule; give None, or another variant"
            )
        if caching is not None and (reason := Caching.of(caching).refuses(self.chunk_size, sizes)):
            raise ValueError(f"memory.{reason}")
        if self.variant == "mac" and sizes is not None:
            raise ValueError(
                f"memory.local_chunk_sizes={sizes!r} with variant='mac': what it writes depends on what it "
                "has recalled segment by segment, so shards cannot be read in parallel; give None for it and "
                "for memory.shard_length, or another variant"
            )

    @property
    def has_memory(self) -> bool:
        """Whether the variant has a long-term memory."""
        return has_memory(self.variant)

    def block_settings(self) -> BlockSettings:
        """The same sizes as the blocks take them."""
        local = self.memory.local_chunk_sizes
        return BlockSettings(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            chunk_size=self.chunk_size,
            segment_length=self.segment_length,
            window=self.sliding_window,
            num_persistent_tokens=self.num_persistent_tokens,
            conv_kernel=self.memory.conv_kernel,
            memory_depth=self.memory_depth,
            memory_expansion=self.memory_expansion,
            rope_theta=self.rope_theta,
            norm_eps=self.rms_norm_eps,
            memory_combination=self.memory.combination,
            memory_options=self.memory.options(),
            local_chunk_sizes=None if local is None else tuple(local),
            shard_length=self.memory.shard_length,
            caching=None if self.memory.caching is None else Caching.of(self.memory.caching),
            periods=None if self.memory.periods is None else tuple(self.memory.periods),
        )

    def state_fields(self) -> dict[str, Any]:
        """What decides shape and meaning of a model's state, as plain JSON values.

        A state saved with other values means nothing to this model. They are arguments of a `TitansConfig`
        that has the same states.
        """
        names = (
            "variant", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "memory_depth",
            "memory_expansion", "chunk_size", "segment_length", "sliding_window", "rope_theta",
        )  # fmt: skip
        memory = self.memory.state_fields()
        if memory["features"] != feature_maps.IDENTITY:
            width = feature_maps.feature_width(memory["features"], memory["feature_size"], self.head_dim)
            memory["feature_size"] = width
        return {**{name: getattr(self, name) for name in names}, "memory": memory}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> TitansConfig:
        """A configuration of `PRESETS`, with fields replaced.

        Raises:
            ValueError: for an unknown preset or field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known: choose one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def saved_state_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """`TitansConfig.state_fields` as a file holds them, in the form of this version.

    Raises:
        ValueError: for a memory that this version cannot make.
    """
    fields = nested(saved)
    if isinstance(memory := fields.get("memory"), dict):
        fields["memory"] = TitansMemoryConfig(**memory).state_fields()
    return fields
