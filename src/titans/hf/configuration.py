"""The configuration of a Titans model, and the sizes it comes in."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from titans.nn.blocks import BLOCKS, WITHOUT_MEMORY, BlockSettings
from titans.nn.combine import COMBINATIONS
from titans.nn.memory.form import MemoryForm
from titans.nn.memory.layer import HALF_LIVES
from titans.nn.memory.tnt.layer import refuses

# What the library itself hands to a configuration beside its fields.
_LIBRARY_KEYS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "tokenizer_class", "torch_dtype", "use_cache",
}  # fmt: skip
# How the library names the kind of a layer, for the parts of it that want to know.
_LAYER_TYPES = {
    "lmm": "linear_attention",
    "transformer": "full_attention",
    "window": "sliding_attention",
}


@strict
class TitansConfig(PreTrainedConfig):
    """Sizes and choices of a Titans model; unknown fields are an error.

    Args:
        variant: "mac", "mag", "mal", "lmm", or a baseline without a memory: "transformer", or "window", whose
            attention sees a window.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: as in any language model.
        num_attention_heads, head_dim: heads of the attention and of the memory.
        memory_depth, memory_expansion: layers of a head's memory network, and its hidden width over head_dim.
        memory_activation, memory_residual, memory_norm: its form, see `titans.memory.MemoryNetwork`.
        memory_normalize_step, memory_row_limit, memory_length_floor,
            memory_decay_to_initial, memory_max_momentum: what keeps it stable, see `NeuralMemory`.
        memory_induction_init: begin as an associative memory of what followed what, see `NeuralMemory`.
        memory_gates_see_keys: gates of the token and of each head's key, not of the token alone.
        memory_gate_hidden_size: units of a hidden layer in the gates, 0 for none, see `NeuralMemory`.
        memory_shortest_half_life, memory_longest_half_life: with which the heads forget at first, in tokens.
        memory_bounded_half_lives: no head ever forgets more slowly than at first.
        memory_max_step_size: upper bound of the step-size gate; None for the default of `NeuralMemory`.
        memory_combination: how "mac" and "mag" combine attention and memory: "gate", the paper's, or "sum".
        memory_local_chunk_sizes: chunks of local memories, which begin anew with every shard, so that shards
            are read side by side: the TNT schedule, see `TNTMemory`. Then chunk_size is the global memory's,
            hundreds of tokens. None for one memory ("mac" has no other). As many chunks of other sizes take
            the same weights.
        memory_shard_length: tokens of a shard; needed with local memories, a multiple of their chunks.
        chunk_size: tokens that share one set of gradient weights; part of the model, not a speed knob.
        segment_length: tokens in a segment of attention ("mac").
        sliding_window: tokens a token attends to, itself included ("mag", "mal", "window").
        num_persistent_tokens: learned tokens per layer.
        conv_kernel: width of the convolution on the memory's queries, keys and values.

    Raises:
        ValueError: for an unknown field or a value outside its domain.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values", "memory_states"]

    variant: str = "mac"
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int = 64
    memory_depth: int = 2
    memory_expansion: int = 4
    memory_activation: str = "silu"
    memory_residual: bool = False
    memory_norm: bool = False
    memory_normalize_step: bool = True
    memory_row_limit: float | None = 8.0
    memory_length_floor: float = 1.0
    memory_decay_to_initial: bool = True
    memory_max_momentum: float = 0.5
    memory_max_step_size: float | None = None
    memory_shortest_half_life: float = HALF_LIVES[0]
    memory_longest_half_life: float = HALF_LIVES[1]
    memory_induction_init: bool = False
    memory_bounded_half_lives: bool = False
    memory_gates_see_keys: bool = False
    memory_gate_hidden_size: int = 0
    memory_combination: str = "gate"
    memory_local_chunk_sizes: list[int] | None = None
    memory_shard_length: int | None = None
    chunk_size: int = 16
    segment_length: int = 512
    sliding_window: int = 2048
    num_persistent_tokens: int = 128
    conv_kernel: int = 4
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown(kwargs)
        # No local memories, said in one way.
        self.memory_local_chunk_sizes = self.memory_local_chunk_sizes or None
        # Once more than the library does, which would wrap the reason in an error of its own kind.
        self.validate_architecture()
        if self.layer_types is None:
            kind = _LAYER_TYPES.get(self.variant, "hybrid_sliding")
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from saved fields, and changes of them: `from_pretrained(folder, chunk_size=32)`.

        Raises:
            ValueError: for a field that is not known or outside its domain.
        """
        # The library would set them afterwards, unseen by any check, and drop those that it does not know.
        changes = {name: kwargs.pop(name) for name in [*kwargs] if name in TitansConfig.__annotations__}
        if changes.keys() & {"variant", "num_hidden_layers"}:
            changes.setdefault("layer_types", None)
        found = super().from_dict({**config_dict, **changes}, **kwargs)
        if not kwargs.get("return_unused_kwargs", False):
            _refuse_unknown({name: value for name, value in kwargs.items() if not hasattr(found, name)})
        return found

    def validate_architecture(self) -> None:
        """Called by the library too, whenever a configuration is made, saved or loaded."""
        if self.variant not in BLOCKS:
            raise ValueError(f"variant={self.variant!r}: choose one of {sorted(BLOCKS)}")
        if self.memory_activation not in ("gelu", "silu"):
            raise ValueError(f"memory_activation={self.memory_activation!r}: choose 'gelu' or 'silu'")
        if self.memory_combination not in COMBINATIONS:
            raise ValueError(
                f"memory_combination={self.memory_combination!r}: choose one of {sorted(COMBINATIONS)}"
            )
        for name, kind in TitansConfig.__annotations__.items():
            value = getattr(self, name)
            if kind == "bool" and type(value) is not bool:
                raise ValueError(f"{name}={value!r}: give True or False")
            least = 0 if name in ("num_persistent_tokens", "memory_gate_hidden_size") else 1
            if kind == "int" and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
            if kind == "float" and (type(value) not in (int, float) or not 0 <= value < math.inf):
                raise ValueError(f"{name}={value!r}: give a finite number of at least 0")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions need an even number")
        if self.memory_max_momentum >= 1:
            raise ValueError(f"memory_max_momentum={self.memory_max_momentum}: give a number in [0, 1)")
        for name, least in (("memory_max_step_size", "at least"), ("memory_row_limit", "above")):
            value = getattr(self, name)
            known = value is None or (type(value) in (int, float) and 0 <= value < math.inf)
            if not known or (value == 0 and least == "above"):
                raise ValueError(f"{name}={value!r}: give None or a finite number {least} 0")
        shortest, longest = self.memory_shortest_half_life, self.memory_longest_half_life
        if not 0 < shortest <= longest:
            raise ValueError(
                f"memory_shortest_half_life={shortest}, memory_longest_half_life={longest}: give numbers "
                "above 0, the second at least the first"
            )
        self._validate_local_memories()
        if not self.rope_theta or not self.rms_norm_eps:
            raise ValueError(
                f"rope_theta={self.rope_theta}, rms_norm_eps={self.rms_norm_eps}: give numbers above 0"
            )

    def _validate_local_memories(self) -> None:
        sizes, shard = self.memory_local_chunk_sizes, self.memory_shard_length
        said = f"memory_local_chunk_sizes={sizes!r}, memory_shard_length={shard!r}"
        if (sizes is None) is not (shard is None):
            raise ValueError(f"{said}: give both or neither")
        if sizes is None or shard is None:
            return
        if self.variant == "mac":
            raise ValueError(
                f"{said} with variant='mac': what it writes depends on what it has recalled segment by "
                "segment, so no shard could be read beside another; give None for both, or another variant"
            )
        if (reason := refuses(sizes, shard)) is not None:
            raise ValueError(f"memory_{reason}")

    @property
    def has_memory(self) -> bool:
        """Whether the variant has a long-term memory."""
        return self.variant not in WITHOUT_MEMORY

    def block_settings(self) -> BlockSettings:
        """The same sizes as the blocks take them."""
        local = self.memory_local_chunk_sizes
        return BlockSettings(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            chunk_size=self.chunk_size,
            segment_length=self.segment_length,
            window=self.sliding_window,
            num_persistent_tokens=self.num_persistent_tokens,
            conv_kernel=self.conv_kernel,
            memory_depth=self.memory_depth,
            memory_expansion=self.memory_expansion,
            rope_theta=self.rope_theta,
            norm_eps=self.rms_norm_eps,
            memory_combination=self.memory_combination,
            memory_options={
                "form": MemoryForm(
                    activation=self.memory_activation,
                    residual=self.memory_residual,
                    norm=self.memory_norm,
                    normalize_step=self.memory_normalize_step,
                    row_limit=self.memory_row_limit,
                    length_floor=self.memory_length_floor,
                    decay_to_initial=self.memory_decay_to_initial,
                    max_momentum=self.memory_max_momentum,
                    max_step_size=self.memory_max_step_size,
                    bounded_half_lives=self.memory_bounded_half_lives,
                    gates_see_keys=self.memory_gates_see_keys,
                    gate_hidden_size=self.memory_gate_hidden_size,
                ),
                "start": "induction" if self.memory_induction_init else "random",
                "half_lives": (self.memory_shortest_half_life, self.memory_longest_half_life),
            },
            local_chunk_sizes=None if local is None else tuple(local),
            shard_length=self.memory_shard_length,
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> TitansConfig:
        """A configuration of `PRESETS`, with fields replaced.

        Raises:
            ValueError: for an unknown preset or field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known: choose one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def _refuse_unknown(values: dict[str, Any]) -> None:
    known = _LIBRARY_KEYS | GenerationConfig._get_default_generation_params().keys()
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if unknown:
        own = sorted(f.name for f in fields(TitansConfig) if f.name in TitansConfig.__annotations__)
        raise ValueError(
            f"{unknown[0]}={values[unknown[0]]!r} is not a field of TitansConfig: choose from {own}"
        )


def _paper(num_layers: int, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    return dict(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=hidden_size // 64,
    )


_BYTES = dict(vocab_size=256, chunk_size=16, segment_length=64, sliding_window=64, num_persistent_tokens=4)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        **_BYTES,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=2,
        memory_expansion=2,
    ),
    "small": dict(
        **_BYTES, hidden_size=256, intermediate_size=704, num_hidden_layers=7, num_attention_heads=4
    ),
    # The paper's sizes (camera-ready, appendix E); the width of the SwiGLU is not given there.
    "170m": _paper(12, 768, 2048),
    "340m": _paper(24, 1024, 2752),
    "760m": _paper(24, 1536, 4096),
    "1.3b": _paper(18, 2048, 5504),
}

# The paper's where it gives one.
PEAK_LEARNING_RATES = {
    "tiny": 3e-3, "small": 3e-3, "170m": 3e-3, "340m": 1.5e-3, "760m": 1.25e-3, "1.3b": 7e-4,
}  # fmt: skip
