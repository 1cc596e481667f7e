"""A pretrained model with a sliding window, and memories that learn during reading."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from titans.hf.generation import StateGenerationMixin
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.cache import GraftCache, GraftState
from titans.hf.graft.configuration import GraftConfig, check_origin
from titans.hf.graft.folder import GraftFolder
from titans.hf.graft.lora import add_lora, is_lora, sharing_weights, without_lora
from titans.hf.graft.memories import MEMORIES, Call, Found, GraftMemory, Inside
from titans.hf.graft.window import Window, WindowState
from titans.hf.keywords import check_keywords, check_targets, check_tokens, documents_of, real_tokens
from titans.nn.adaptation import Adaptation
from titans.nn.association import Association
from titans.nn.packing import Packed
from titans.nn.residual import ResidualBranches


@dataclass
class GraftOutput(ModelOutput):
    """What a graft returns.

    loss: mean cross-entropy in nats, with `labels`. logits: (batch, time or fewer, vocab_size).
    past_key_values: the cache. surprises: with `output_surprise`, of each memory in the order of `MEMORIES`:
    of residual branches (batch, time, layers), the squared error of what each token's key recalled; of the
    association (batch, time, 1), that of what its context recalled; of the adaptation (batch, time, 1), its
    own loss of each token in nats, 0 for the first of a text. base_logits:
    with `output_base_logits`, the base's logits in the same window without a memory, shaped as logits.
    association_logits: with `output_base_logits` and both memories, those with the association alone.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: GraftCache | None = None
    surprises: tuple[Tensor, ...] | None = None
    base_logits: Tensor | None = None
    association_logits: Tensor | None = None


class GraftedForCausalLM(GraftFolder, StateGenerationMixin):  # type: ignore[misc]
    """A causal LM of transformers, the base, read through a window, with memories of its own.

    Made by `titans.graft`. The base is part of it, frozen, and is never saved with it.

    Args:
        base: its parameters are frozen; otherwise it is unchanged and can still be used alone. With `lora` in
            the configuration nothing of it changes: the graft has a copy that shares its weights.

    Raises:
        ValueError: for a base that cannot be grafted, or that is not the one in the configuration.
    """

    config: GraftConfig
    config_class = GraftConfig
    base_model_prefix = "base"
    _is_stateful = True
    _skip_keys_device_placement = ["past_key_values"]
    # The loss is a mean; without this the Trainer would rescale it under gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: GraftConfig, base: PreTrainedModel | None = None) -> None:
        if base is None:
            raise ValueError(
                "a graft has no base of its own: use titans.graft(base), or from_pretrained(folder, base=…)"
            )
        super().__init__(config)
        check_origin(base, config.origin)
        window = Window(config.window, config.sinks)
        # Each is an attribute of its name, None where there is none.
        self.adaptation: Adaptation | None
        self.association: Association | None
        self.residual: ResidualBranches | None
        for name, kind in MEMORIES.items():
            settings = config.memories.get(name)
            made = None if settings is None else kind.make(config.hidden_size, config.vocab_size, settings)
            setattr(self, name, made)
        # Whatever is refused, the base is unchanged.
        if config.lora is not None:
            base = sharing_weights(base)
        windowed = WindowedBase(base, window)
        for name in config.memories:
            if layers := getattr(getattr(self, name), "layers", ()):
                windowed.check_layers(layers, name)
        # Before the base is assigned, so that `post_init` does not initialise the base's weights anew.
        self.post_init()
        if config.lora is not None:
            add_lora(base, config.lora)
        self.base = base.requires_grad_(False).eval()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(is_lora(name))
        # transformers' Trainer leaves these out of its checkpoints, without a warning.
        self._keys_to_ignore_on_save = self.state_dict().keys() - self.own_state_dict().keys()
        self._windowed = windowed
        self._memories: dict[str, GraftMemory] = {}
        for name in config.memories:
            module = getattr(self, name).to(base.device)
            self._memories[name] = MEMORIES[name](module, windowed)
        # Saved with the graft, so that a folder is complete but for the base.
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.generation_config = copy.deepcopy(base.generation_config)
        config.keep()

    def _init_weights(self, module: nn.Module) -> None:
        """Memories initialise themselves."""

    def train(self, mode: bool = True) -> GraftedForCausalLM:
        """Training mode for the memories alone: the base has no dropout here."""
        super().train(mode)
        if "base" in self._modules:
            self.base.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's precision; memories are in float32 at least."""
        return self.base.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings() if "base" in self._modules else None

    def empty_cache(self) -> GraftCache:
        return GraftCache(self.config)

    def check_cache(self, cache: Any) -> None:
        if not isinstance(cache, GraftCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: a grafted model needs GraftCache(config)"
            )
        cache.check_fits(self.config)

    def initial_state(self, rows: int) -> GraftState:
        """The state of rows that have read nothing."""
        states = {
            name: memory.initial_state(rows, self.device, self.dtype)
            for name, memory in self._memories.items()
        }
        return GraftState(self._windowed.initial_state(rows), states)

    def read_base(self, ids: Tensor, window: WindowState | None = None) -> tuple[Tensor, WindowState]:
        """What the base alone predicts in its window, without anything that the graft adds.

        Args:
            ids: (batch, time) int64.
            window: after the tokens before these; None at the start of a text.

        Returns logits (batch, time, vocab_size) and the window after these tokens.
        """
        if window is None:
            window = self._windowed.initial_state(len(ids))
        with without_lora(self.base):
            hidden, window = self._windowed.read(ids, window)
        return self._windowed.head.logits(hidden), window

    @torch.no_grad()
    def whiten(self, ids: Tensor) -> None:
        """Set the mean and covariance of the memories' inputs from ids (n,) of any text, n > 2.

        Raises:
            ValueError: without a memory.
        """
        if not self.config.has_memory:
            raise ValueError("this graft has no memory: whitening applies to a memory's inputs")
        x = self._checked(ids.reshape(1, -1).to(self.device), None)
        call = Call(self._windowed.head, x, Packed(), 0, frozen=True, surprise=False)
        hidden, between, _, _ = self._read_base(call, self.initial_state(1))
        for memory in self._memories.values():
            memory.whiten(hidden, [between[layer] for layer in memory.layers])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GraftCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_surprise: bool = False,
        freeze_memory: bool = False,
        output_base_logits: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **keywords: Any,
    ) -> GraftOutput | tuple[Any, ...]:
        """Read a stretch of tokens, of any length.

        Args:
            input_ids: (batch, time) int64, or, without a memory, `inputs_embeds`.
            attention_mask: (batch, time), or (batch, seen + time) with `past_key_values`; 0 marks padding,
                anywhere. A row is read as if it stood alone without it.
            past_key_values: what was read before; it is updated.
            labels: (batch, time) int64, the input ids again; shifted here, −100 is ignored.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these.
            output_surprise: return each memory's surprise at every token.
            freeze_memory: no memory learns.
            output_base_logits: return what the base alone predicts from the same states, too, and with two
                memories what it predicts with the association alone.
            keywords: keywords of transformers are accepted where they change nothing.

        Raises:
            ValueError: for contradictory or ill-shaped arguments, and requests that cannot be met.
            TypeError: for an unknown keyword.
        """
        position_ids = keywords.pop("position_ids", None)
        if keywords.pop("output_hidden_states", False):
            raise ValueError("output_hidden_states: call the base for them; leave it out")
        check_keywords(keywords, position_ids)
        x = self._checked(input_ids, inputs_embeds)
        batch, time = x.shape[:2]
        check_targets(labels, logits_to_keep, x)
        if freeze_memory and not self.config.has_memory:
            raise ValueError("freeze_memory=True: this graft has no memory that learns; leave it out")
        if output_base_logits and self.config.changes_base:
            raise ValueError(
                "output_base_logits=True: this graft changes the base's own states; call read_base(ids, "
                "window), too"
            )
        if (cache := past_key_values) is not None:
            self.check_cache(cache)
        seen = set() if cache is None else {cache.get_seq_length(), cache.num_columns}
        real = real_tokens(attention_mask, batch, time, seen)
        if position_ids is not None and documents_of(position_ids, real, (batch, time)) is not None:
            raise ValueError("position_ids restart inside a row: give a grafted model one document per row")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.empty_cache()
        if cache is not None:
            cache.check_rows(batch)
        state = None if cache is None else cache.state
        state = self.initial_state(batch) if state is None else state

        # Everything stateful sees real tokens only, each row's moved to its front.
        rows = Packed.of(real)
        x = rows.pack(x)
        call = Call(self._windowed.head, x, rows, logits_to_keep, freeze_memory, output_surprise)
        hidden, window, found = self._read(call, state)
        base_logits, association_logits, loss = None, None, None
        logits = next((one.logits for one in found.values() if one.logits is not None), None)
        mixes = [one.mix for one in found.values() if one.mix is not None]
        if logits is None or output_base_logits:
            base_logits = call.head.logits(call.kept(hidden))
        if logits is None:
            assert base_logits is not None
            logits = base_logits
        elif output_base_logits and mixes:
            association_logits = base_logits
        for mix in mixes:
            logits = mix(logits)
            association_logits = None if association_logits is None else mix(association_logits)
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        # Last, so that a call that fails has not been read.
        if past_key_values is not None:
            states = {name: one.state for name, one in found.items()}
            past_key_values.store((GraftState(window, states),), time, input_ids)
        output = GraftOutput(
            loss,
            logits,
            past_key_values,
            tuple(one.surprise for one in found.values() if one.surprise is not None) or None,
            base_logits if output_base_logits else None,
            association_logits,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _read_base(
        self, call: Call, state: GraftState
    ) -> tuple[Tensor, dict[int, Tensor], WindowState, dict[str, Inside | None]]:
        """The base reads, with what memories do inside it.

        Returns the head's input and, by layer, the states that memories read, packed; the window's new state;
        and what was done inside, by memory.
        """
        inside = {name: memory.inside(call, state.memories[name]) for name, memory in self._memories.items()}
        layers = sorted({layer for memory in self._memories.values() for layer in memory.layers})
        hidden, states, window = self._windowed.read_layers(
            call.ids,
            state.window,
            call.rows.lengths,
            layers=layers,
            changes=[one for one in inside.values() if one is not None],
        )
        return hidden, dict(zip(layers, states, strict=True)), window, inside

    def _read(self, call: Call, state: GraftState) -> tuple[Tensor, WindowState, dict[str, Found]]:
        """The head's input, packed; the window's new state; and what each memory did."""
        hidden, between, window, inside = self._read_base(call, state)
        found = {}
        for name, memory in self._memories.items():
            states = [between[layer] for layer in memory.layers]
            found[name] = memory.read(call, state.memories[name], hidden, states, inside[name])
        return hidden, window, found

    def _checked(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The ids, or the embeddings; ValueError for another shape or type, and on a CPU for unknown ids."""
        if inputs_embeds is not None and input_ids is None and self.config.has_memory:
            raise ValueError("inputs_embeds: a memory learns the token ids; give input_ids")
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds
        if input_ids.numel() and input_ids.device.type == "cpu":
            least, most = (int(x) for x in input_ids.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids holds {least} to {most}: give ids from 0 to {self.config.vocab_size - 1}, "
                    "the vocabulary"
                )
        return input_ids


AutoConfig.register("titans-graft", GraftConfig)
AutoModelForCausalLM.register(GraftConfig, GraftedForCausalLM)
