"""Titans models in the transformers library: `TitansModel`, `TitansForCausalLM`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationConfig, StoppingCriteriaList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from titans.hf.cache import TitansCache
from titans.hf.configuration import TitansConfig
from titans.hf.generation import note_ended_rows, padding_first, with_prompt
from titans.hf.keywords import Documents, check_keywords, documents_of
from titans.hf.offload import all_parameters, execution_device, is_offloaded
from titans.nn.blocks import BLOCKS, BlockResult
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.mlp import SwiGLU
from titans.nn.norm import RMSNorm
from titans.nn.packing import Packed, take
from titans.state import where_rows

PREFILL_LENGTH = 2048
_PROMPTS = ("input_ids", "inputs_embeds")


@dataclass
class TitansOutput(ModelOutput):
    """What the models return.

    loss: mean cross-entropy in nats, with `labels`. logits: (batch, time, vocab_size). last_hidden_state and
    hidden_states: (batch, time, hidden_size). past_key_values: the cache. memory_states: the blocks' states,
    inside the autograd graph. surprises: per memory layer (batch, time, heads), ‖M(k) − v‖² before the write.
    traces: per memory layer what it did at each token, 0 at padding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory_states: tuple[Any, ...] | None = None
    surprises: tuple[Tensor, ...] | None = None
    traces: tuple[MemoryTrace, ...] | None = None


class TitansLayer(GradientCheckpointingLayer):
    """One block of the chosen variant, then SwiGLU, each with a norm before it and a residual connection."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.mixer = BLOCKS[config.variant](config.block_settings())
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, state: Any, restart: Tensor | None, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size); state of this layer or None; rows (batch,) to start afresh or None.

        The initial state is made here, where sharded parameters have been gathered. The state is an argument
        and a result of the layer because gradient checkpointing drops any cache.
        """
        with all_parameters(self) if is_offloaded(self.mlp_norm) else nullcontext():
            if state is None:
                state = self.mixer.initial_state(x.shape[0])
            elif restart is not None:
                state = where_rows(restart, self.mixer.initial_state(x.shape[0]), state)
            x, state, trace = self.mixer(x, state, context)
            return BlockResult(x + self.mlp(self.mlp_norm(x)), state, trace)

    def initial_state(self, batch: int) -> Any:
        """The state of rows that have read nothing, wherever the parameters are kept."""
        with all_parameters(self):
            return self.mixer.initial_state(batch)

    def fresh_context(self, state: Any) -> Any:
        """An initial state that keeps the memory alone, likewise."""
        with all_parameters(self):
            return self.mixer.fresh_context(state)


class TitansPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what the library may and may not do with these models."""

    config: TitansConfig
    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_sdpa = True

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where an offloaded model computes, not where its parameters are kept."""
        return execution_device(self.get_input_embeddings()) or super().device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint has filled, and nothing else."""
        if all(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
            return
        # All of them: a module may set what its children hold, too.
        loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif isinstance(persistent := getattr(module, "persistent", None), nn.Parameter):
            nn.init.normal_(persistent)
        for parameter, value in loaded:
            parameter.copy_(value)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        use_reentrant: bool = False,
        **kwargs: Any,
    ) -> None:
        """Turn on gradient checkpointing, of the non-re-entrant kind.

        Raises:
            ValueError: for use_reentrant=True, whose gradients through a carried state are silently wrong.
        """
        if use_reentrant or (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True gives wrong gradients through the memory's state: pass "
                "use_reentrant=False"
            )
        self._activation_checkpointing_enable(
            {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}, **kwargs
        )


class TitansModel(TitansPreTrainedModel):
    """Embedding, blocks and final norm; state in, state out."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TitansLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        memory_states: tuple[Any, ...] | None = None,
        restart: Tensor | None = None,
        return_memory_states: bool = False,
        output_surprise: bool = False,
        output_trace: bool = False,
        freeze_memory: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **keywords: Any,
    ) -> TitansOutput | tuple[Any, ...]:
        """Read a stretch of tokens.

        Args:
            input_ids: (batch, time) int64, or `inputs_embeds` (batch, time, hidden_size).
            attention_mask: (batch, time), or (batch, seen + time) with `past_key_values`; 0 marks padding,
                anywhere. Only its last `time` columns are read.
            past_key_values: what was read before, for inference; it is updated.
            use_cache: return a cache; by default as configured, outside training and `torch.export`.
            memory_states: what was read before, for training; gradients flow through it.
            restart: (batch,) bool, rows of `memory_states` that start afresh.
            return_memory_states: return the blocks' states, inside the autograd graph.
            output_surprise: return each memory's surprise at every token.
            output_trace: return what each memory did at every token, its gates among it.
            freeze_memory: no memory learns: step sizes are 0, while forgetting and momentum go on.
            keywords: `position_ids` (batch, time): where they restart inside a row, another document begins,
                which is read as if it stood alone. Other keywords of transformers are accepted where they
                change nothing.

        Raises:
            ValueError: for contradictory or ill-shaped arguments, and requests that cannot be met.
            TypeError: for an unknown keyword.
        """
        position_ids = keywords.pop("position_ids", None)
        check_keywords(keywords, position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and memory_states is not None:
            raise ValueError("give past_key_values (inference) or memory_states (training), not both")
        if past_key_values is not None:
            _check_cache(past_key_values, self.config)
        x = self._embedded(input_ids, inputs_embeds)
        batch, time, _ = x.shape
        if memory_states is not None and len(memory_states) != len(self.layers):
            raise ValueError(
                f"memory_states holds {len(memory_states)}: give one for each of {len(self.layers)} layers"
            )
        if restart is not None and (restart.shape != (batch,) or restart.dtype != torch.bool):
            raise ValueError(
                f"restart has shape {tuple(restart.shape)} and dtype {restart.dtype}: give ({batch},) in "
                "torch.bool"
            )
        if (documents := self._documents(position_ids, attention_mask, batch, time)) is not None:
            carried = dict(
                past_key_values=past_key_values,
                memory_states=memory_states,
                use_cache=use_cache,
                return_memory_states=return_memory_states,
                output_trace=output_trace,
            )
            if wrong := [name for name, value in carried.items() if value not in (None, False)]:
                raise ValueError(
                    f"{wrong[0]} with position_ids that restart inside a row: documents packed into one row "
                    "have no common state; give one document per row, or leave it out"
                )
            output = self.forward(
                inputs_embeds=documents.split(x),
                attention_mask=documents.mask,
                use_cache=False,
                output_surprise=output_surprise,
                freeze_memory=freeze_memory,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
            output = pytree.tree_map(documents.join, output)
            return output if return_dict else output.to_tuple()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
        if use_cache and past_key_values is None and memory_states is None:
            past_key_values = TitansCache(self.config)
        if past_key_values is not None:
            if past_key_values.batch_size not in (-1, batch):
                raise ValueError(
                    f"past_key_values holds {past_key_values.batch_size} rows, the input has {batch}: repeat "
                    "or select its rows first"
                )
            memory_states = past_key_values.states

        if freeze_memory and not self.config.has_memory:
            raise ValueError(f"freeze_memory=True: variant {self.config.variant!r} has no memory")
        # Everything stateful sees real tokens only, each row's moved to its front.
        rows = Packed.of(self._real_tokens(attention_mask, batch, time, past_key_values))
        x = rows.pack(x)
        context = BlockContext(rows, trace=output_surprise or output_trace, frozen=freeze_memory)
        hidden_states = [rows.unpack(x)] if output_hidden_states else None
        states: list[Any] = []
        traces: list[MemoryTrace] = []
        for index, layer in enumerate(self.layers):
            before = None if memory_states is None else memory_states[index]
            x, state, trace = layer(x, before, restart, context)
            states.append(state)
            traces += [] if trace is None else [trace.map_tokens(rows.unpack)]
            if hidden_states is not None:
                hidden_states.append(rows.unpack(x))
        x = self.norm(rows.unpack(x))

        if past_key_values is not None:
            past_key_values.store(tuple(states), time, input_ids)
        output = TitansOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            memory_states=tuple(states) if return_memory_states else None,
            surprises=tuple(trace.surprise for trace in traces) if output_surprise else None,
            traces=tuple(traces) if output_trace else None,
        )
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _documents(
        position_ids: Tensor | None, attention_mask: Tensor | None, batch: int, time: int
    ) -> Documents | None:
        """The documents that are packed into the rows; None where every row is one document."""
        if position_ids is None:
            return None
        real = None if attention_mask is None else attention_mask[:, -time:].bool()
        documents = documents_of(position_ids, real, (batch, time))
        return None if documents is None else Documents(documents, real)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(batch, time, hidden_size); ValueError for another shape or type, and on a CPU for unknown ids."""
        if input_ids is None:
            assert inputs_embeds is not None
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}: give (batch, time, "
                    f"hidden_size={self.config.hidden_size})"
                )
            return inputs_embeds
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: give (batch, "
                "time) in torch.int64"
            )
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            least, most = input_ids.aminmax()
            raise ValueError(
                f"input_ids holds {int(least)} to {int(most)}: give ids from 0 to "
                f"{self.embed_tokens.num_embeddings - 1}, the vocabulary"
            ) from None

    @staticmethod
    def _real_tokens(
        attention_mask: Tensor | None, batch: int, time: int, cache: TitansCache | None
    ) -> Tensor | None:
        if attention_mask is None:
            return None
        seen = {0} if cache is None else {0, cache.get_seq_length(), cache.num_columns}
        if tuple(attention_mask.shape) not in {(batch, n + time) for n in seen}:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: give ({batch}, {time}), or "
                f"({batch}, {max(seen) + time}) with everything seen; 0 for padding"
            )
        real = attention_mask[:, attention_mask.shape[1] - time :].bool()
        # A compiled graph cannot look, and takes a mask for one that hides something.
        return real if torch.compiler.is_compiling() or not bool(real.all()) else None


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """A Titans model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # The loss is a mean; without this the Trainer would rescale it under gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory_states: tuple[Any, ...] | None = None,
        restart: Tensor | None = None,
        return_memory_states: bool = False,
        output_surprise: bool = False,
        output_trace: bool = False,
        freeze_memory: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **keywords: Any,
    ) -> TitansOutput | tuple[Any, ...]:
        """Logits of the next token; see `TitansModel.forward`.

        Args:
            labels: (batch, time) int64, the input ids again; shifted here, −100 is ignored.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these.
            num_items_in_batch: divide the summed loss by this, the labels of all accumulated batches, in
                place of the labels given here.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory_states=memory_states,
            restart=restart,
            return_memory_states=return_memory_states,
            output_surprise=output_surprise,
            output_trace=output_trace,
            freeze_memory=freeze_memory,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **keywords,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(output.last_hidden_state[:, keep]), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        # A new one: the library's outputs keep what was set before, and the order in which it was set.
        output = TitansOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            memory_states=output.memory_states,
            surprises=output.surprises,
            traces=output.traces,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The one hook through which our cache, chunked prefill and beam search work together."""
        _refuse_cache_kind(generation_config.cache_implementation)
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = TitansCache(self.config)
        vars(generation_config)["_titans_cache"] = cache = model_kwargs["past_key_values"]
        cache.ended_rows = None
        if generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None:
            generation_config.prefill_chunk_size = PREFILL_LENGTH

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        criteria: Callable[..., StoppingCriteriaList] = super()._get_stopping_criteria
        cache = vars(generation_config).pop("_titans_cache", None)
        return note_ended_rows(criteria(generation_config, *args, **kwargs), generation_config, cache)

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What the library prepares; the padding of rows that have ended is masked."""
        prepare: Callable[..., Any] = super().prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and cache.ended_rows is not None and bool(cache.ended_rows.any()):
            inputs["attention_mask"] = (~cache.ended_rows).long().unsqueeze(1)
        return inputs

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; with a filled `past_key_values` the ids given are the new ones.

        The library would need an attention mask over everything ever seen to continue, and drops tokens
        silently without one. Here new ids alone are enough, with a mask of their own, over seen + new, or
        none; the whole text again, with a mask, is recognised by the ids that the cache has seen last
        (embeddings by their number). Without a mask every id is a real token, the padding id too. With one,
        padding may stand anywhere, also at the right. What the library pads after a row's end is not read.

        Raises:
            ValueError: for a mask of any other length, nothing to continue with in some row, a cache of
                another kind or configuration, or a cache that is not to be used.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        prompt = kwargs.get("inputs_embeds")
        if prompt is None:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
        generate: Callable[..., Any] = super().generate
        check_keywords({"output_attentions": kwargs.get("output_attentions")}, None)
        if cache is not None:
            _check_cache(cache, self.config)
            if kwargs.get("use_cache") is False:
                raise ValueError("use_cache=False with past_key_values: leave one of them out")
            # Whatever the configuration says: without it the library would read all ids again at every token.
            kwargs["use_cache"] = True
        if prompt is None:
            return generate(inputs, *args, **kwargs)
        rows, given = prompt.shape[:2]
        seen = 0 if cache is None else cache.num_columns
        if not given:
            raise ValueError("no tokens are given to continue with: give the last one, or more")
        if mask is None:
            # The library would take a token equal to the padding id for padding.
            mask = torch.ones(rows, given, dtype=torch.int64, device=prompt.device)
            whole_text_again = False
        else:
            whole_text_again = mask.shape[-1] == given and self._repeats_what_was_seen(cache, prompt)
        if tuple(mask.shape) not in {(rows, given), (rows, seen + given)}:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: give ({rows}, {given}), or "
                f"({rows}, {seen + given}) with everything seen"
            )
        mask = mask[:, mask.shape[1] - given :]
        order = padding_first(mask, seen if whole_text_again else 0)
        if order is not None:
            # The library takes the last column for the last token.
            mask = mask.gather(1, order)
            inputs = None if inputs is None else take(inputs, order)
            kwargs |= {name: take(kwargs[name], order) for name in _PROMPTS if kwargs.get(name) is not None}
        kwargs["attention_mask"] = mask
        fresh = cache is not None and not whole_text_again
        if cache is not None:
            cache.begin_call(fresh)
        try:
            found = generate(inputs, *args, **kwargs)
        finally:
            if cache is not None:
                cache.begin_call(fresh=False)
        return found if order is None or prompt.is_floating_point() else with_prompt(found, prompt)

    @staticmethod
    def _repeats_what_was_seen(cache: TitansCache | None, prompt: Tensor) -> bool:
        if cache is None or prompt.shape[1] <= cache.num_columns:
            return False
        # Embeddings cannot be compared with ids: there the library's convention decides.
        return prompt.is_floating_point() or cache.is_beginning_of(prompt)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching works on pages of keys and values, and a memory has none."""
        _refuse_cache_kind("paged")
        raise AssertionError


def _check_cache(cache: Any, config: TitansConfig) -> None:
    if not isinstance(cache, TitansCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: a Titans model needs TitansCache(config); "
            "in place of prefix tuning, which adds keys and values, use prompt tuning or LoRA"
        )
    cache.check_fits(config)


def _refuse_cache_kind(name: str | None) -> None:
    if name is not None:
        raise ValueError(
            f"cache_implementation={name!r}: a Titans model keeps its own TitansCache; leave this unset"
        )


AutoConfig.register("titans", TitansConfig)
AutoModel.register(TitansConfig, TitansModel)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM)
