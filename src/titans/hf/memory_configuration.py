"""The configuration of a Titans model's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from titans.hf.known_fields import refuse_unknown
from titans.memory import OBJECTIVES, UPDATE_RULES
from titans.nn.combine import COMBINATIONS
from titans.nn.memory import features as feature_maps
from titans.nn.memory import starts
from titans.nn.memory.caching import Caching
from titans.nn.memory.form import RULE_FIELDS, MemoryForm
from titans.nn.memory.half_lives import HALF_LIVES, refuses_half_lives
from titans.nn.memory.tnt.layer import refuses

# Fields of a memory that say when its parts are updated, and what is kept.
_SCHEDULES = ("local_chunk_sizes", "shard_length", "caching", "periods")


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
        if self.combination not in COMBINATIONS:
            raise ValueError(f"memory.combination={self.combination!r}: choose one of {sorted(COMBINATIONS)}")
        if type(self.conv_kernel) is not int or self.conv_kernel < 1:
            raise ValueError(f"memory.conv_kernel={self.conv_kernel!r}: give a whole number of at least 1")
        if reason := (
            starts.refuses(self.start, self.conv_kernel)
            or feature_maps.refuses(self.features, self.feature_size, self.memory_form.residual)
            or refuses_half_lives(self.half_lives)
        ):
            raise ValueError(f"memory.{reason}")
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


def _described_rule(form: MemoryForm, given: Any) -> dict[str, Any]:
    """A rule's name and parameters without those that it takes from the form."""
    described = UPDATE_RULES.describe(form.rule(given))
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        shared = {*RULE_FIELDS} - {*given}
        described = {name: value for name, value in described.items() if name not in shared}
    return described


def changed_memory(saved: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Saved fields of a memory's configuration with some replaced, and of its form as well."""
    saved = dict(saved or {})
    form, change = saved.get("form", "stable"), changes.get("form")
    if isinstance(change, Mapping) and "name" not in change:
        change = {**({"name": form} if isinstance(form, str) else form), **change}
        changes = {**changes, "form": change}
    return {**saved, **changes}
