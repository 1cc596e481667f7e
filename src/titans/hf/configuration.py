"""The configuration of a Titans model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from titans.hf.flat_config import nested, remedy
from titans.hf.presets import PRESETS
from titans.memory import OBJECTIVES, UPDATE_RULES
from titans.nn.blocks import BLOCKS, BlockSettings, has_memory
from titans.nn.combine import COMBINATIONS
from titans.nn.memory import features as feature_maps
from titans.nn.memory.caching import Caching
from titans.nn.memory.form import RULE_FIELDS, MemoryForm
from titans.nn.memory.layer import HALF_LIVES, RECALL_STARTS, STARTS
from titans.nn.memory.tnt.layer import refuses

# What the library itself hands to a configuration in addition to its fields.
_LIBRARY_KEYS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "tokenizer_class", "torch_dtype", "use_cache",
}  # fmt: skip
# Fields of a memory that say when its parts are updated, and what is kept.
_SCHEDULES = ("local_chunk_sizes", "shard_length", "caching", "periods")
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
class TitansMemoryConfig(PreTrainedConfig):
    """The memory of a Titans model, apart from its sizes: `TitansConfig.memory`. Unknown fields are an error.

    Args:
        form: what keeps the memory stable and what its gates see: "stable", "paper", "recall", or
            {"name": "recall", "gate_hidden_size": 32} for a named form with some fields replaced, see
            `MemoryForm`. It is kept with all its fields, so that a checkpoint does not depend on the names.
        features: what a memory of depth 1 learns on in place of the keys: a name in
            `titans.nn.memory.FEATURES`, "identity" for the keys themselves.
        feature_size: numbers of these features; None for 4 · head_dim.
        objective: what the memory minimises while it reads: a name in `titans.memory.OBJECTIVES`, or
            {"name": "huber", "delta": 0.5}.
        rule: how its weights are updated: a name in `titans.memory.UPDATE_RULES`, or {"name": …, parameter:
            …}; None for the momentum rule of the form. What a rule and a form both have, such as
            normalize_step, is the form's unless given here.
        start: "random"; or "induction" or "sharp": an associative memory of what followed what.
        conv_kernel: width of the convolution on the memory's queries, keys and values.
        half_lives: the shortest and the longest with which the heads forget at first, in tokens.
        combination: how "mac" and "mag" combine attention and memory: "gate", the paper's, or "sum".
        local_chunk_sizes: chunks of local memories, which begin anew with every shard, so that shards are
            read in parallel: the TNT schedule, see `TNTMemory`. Then the model's chunk_size is the global
            memory's, hundreds of tokens. None for one memory ("mac" has no other). The same number of other
            sizes takes the same weights.
        shard_length: tokens of a shard; needed with local memories, a multiple of their chunks.
        caching: {"every": 512, "keep": "log"} to keep checkpoints of the memory along the text and read them,
            too, see `CachedMemory`; `keep` may be "linear". None for none.
        periods: of "hope", in tokens: after how many each memory of its continuum is updated, one for each;
            None for 4, 16 and 64 chunks.

    Raises:
        ValueError: for an unknown field or a value outside its domain, named `memory.FIELD`.
    """

    model_type = "titans_memory"
    base_config_key = "memory"

    form: Any = "stable"
    features: str = "identity"
    feature_size: int | None = None
    objective: Any = "squared_error"
    rule: Any = None
    start: str = "random"
    conv_kernel: int = 4
    half_lives: Any = HALF_LIVES
    combination: str = "gate"
    local_chunk_sizes: list[int] | None = None
    shard_length: int | None = None
    caching: Any = None
    periods: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown(kwargs, TitansMemoryConfig)
        # No local memories, stated in one way.
        self.local_chunk_sizes = self.local_chunk_sizes or None
        # Once more than the library does, which would wrap the reason in an error of its own kind.
        self.validate_architecture()
        self.half_lives = [*self.half_lives]
        self.objective = OBJECTIVES.describe(OBJECTIVES.make(self.objective))
        given = self.form if isinstance(self.form, Mapping) else {"name": self.form}
        name = {} if isinstance(self.form, MemoryForm) else {"name": given.get("name", "stable")}
        if self.caching is not None:
            self.caching = Caching.of(self.caching).describe()
        form = self.memory_form
        if self.rule is not None:
            self.rule = _described_rule(form, self.rule)
        self.form = name | asdict(form)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by the library too, whenever a configuration is made, saved or loaded."""
        for name, check in (
            ("form", lambda: self.memory_form),
            ("objective", lambda: OBJECTIVES.make(self.objective)),
            ("rule", lambda: self.memory_form.rule(self.rule)),
            ("caching", lambda: self.caching is None or Caching.of(self.caching)),
        ):
            try:
                check()
            except (TypeError, ValueError) as error:
                raise ValueError(f"memory.{name}: {error}") from None
        for name, known in (("start", STARTS), ("combination", sorted(COMBINATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"memory.{name}={getattr(self, name)!r}: choose one of {list(known)}")
        if type(self.conv_kernel) is not int or self.conv_kernel < 1:
            raise ValueError(f"memory.conv_kernel={self.conv_kernel!r}: give a whole number of at least 1")
        if self.start in RECALL_STARTS and self.conv_kernel < 2:
            raise ValueError(
                f"memory.start={self.start!r} looks one token back: give a conv_kernel of at least 2"
            )
        if reason := feature_maps.refuses(self.features, self.feature_size, self.memory_form.residual):
            raise ValueError(f"memory.{reason}")
        if not _are_half_lives(self.half_lives):
            raise ValueError(
                f"memory.half_lives={self.half_lives!r}: give two numbers above 0, the shorter one first"
            )
        if self.periods is not None and not (
            self.periods and all(type(n) is int and n > 0 for n in self.periods)
        ):
            raise ValueError(f"memory.periods={self.periods!r}: give whole numbers of at least 1, or None")
        sizes, shard = self.local_chunk_sizes, self.shard_length
        if (sizes is None) is not (shard is None):
            raise ValueError(
                f"memory.local_chunk_sizes={sizes!r}, memory.shard_length={shard!r}: give both or neither"
            )
        if sizes is not None and shard is not None and (reason := refuses(sizes, shard)) is not None:
            raise ValueError(f"memory.{reason}")

    @property
    def memory_form(self) -> MemoryForm:
        """The form as an object."""
        return MemoryForm.of(self.form)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `NeuralMemory`: all but its sizes."""
        return {
            "objective": self.objective,
            "rule": self.rule,
            "form": self.memory_form,
            "features": self.features,
            "feature_size": self.feature_size,
            "start": self.start,
            "half_lives": (self.half_lives[0], self.half_lives[1]),
        }

    def state_fields(self) -> dict[str, Any]:
        """What decides shape and meaning of a memory's state, see `TitansConfig.state_fields`."""
        form = self.memory_form
        names = ("activation", "residual", "norm", "gated", "decay_to_initial")
        return {
            "form": {name: getattr(form, name) for name in names},
            "objective": self.objective,
            "rule": UPDATE_RULES.describe(form.rule(self.rule)),
            **{
                name: getattr(self, name)
                for name in ("features", "feature_size", "conv_kernel", "combination")
            },
            **{name: getattr(self, name) for name in _SCHEDULES},
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
            changes["memory"] = _changed_memory(saved.get("memory"), changes["memory"])
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


def _are_half_lives(given: Any) -> bool:
    numbers = isinstance(given, (list, tuple)) and all(type(x) in (int, float) for x in given)
    return numbers and len(given) == 2 and 0 < given[0] <= given[1] < math.inf


def _described_rule(form: MemoryForm, given: Any) -> dict[str, Any]:
    """A rule's name and parameters without those that it takes from the form."""
    described = UPDATE_RULES.describe(form.rule(given))
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        shared = {*RULE_FIELDS} - {*given}
        described = {name: value for name, value in described.items() if name not in shared}
    return described


def _changed_memory(saved: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Saved fields of a memory's configuration with some replaced, and of its form as well."""
    saved = dict(saved or {})
    form, change = saved.get("form", "stable"), changes.get("form")
    if isinstance(change, Mapping) and "name" not in change:
        change = {**({"name": form} if isinstance(form, str) else form), **change}
        changes = {**changes, "form": change}
    return {**saved, **changes}


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
