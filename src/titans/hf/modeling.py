"""Titans models in the transformers library: `TitansModel`, `TitansForCausalLM`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from titans.hf.cache import TitansCache
from titans.hf.configuration import TitansConfig
from titans.hf.generation import TitansGenerationMixin, check_cache
from titans.hf.keywords import (
    Documents,
    check_keywords,
    check_targets,
    check_tokens,
    documents_of,
    real_tokens,
)
from titans.hf.layer import TitansLayer, TitansOutput, TitansPreTrainedModel
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.kernels import token
from titans.nn.norm import RMSNorm
from titans.nn.packing import Packed


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
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        if past_key_values is not None and memory_states is not None:
            raise ValueError("give past_key_values (inference) or memory_states (training), not both")
        if past_key_values is not None:
            check_cache(past_key_values, self.config)
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
            past_key_values.check_rows(batch)
            memory_states = past_key_values.states

        if freeze_memory and not self.config.has_memory:
            raise ValueError(f"freeze_memory=True: variant {self.config.variant!r} has no memory")
        # Everything stateful sees real tokens only, each row's moved to its front.
        cache = past_key_values
        seen = set() if cache is None else {cache.get_seq_length(), cache.num_columns}
        rows = Packed.of(real_tokens(attention_mask, batch, time, seen))
        x = rows.pack(x)
        context = BlockContext(rows, trace=output_surprise or output_trace, frozen=freeze_memory)
        hidden_states = [rows.unpack(x)] if output_hidden_states else None
        states: list[Any] = []
        traces: list[MemoryTrace] = []
        with nullcontext() if torch.compiler.is_compiling() else token.reading(x):
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
        """(batch, time, hidden_size) of checked tokens; ValueError on a CPU for ids outside the range."""
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            least, most = input_ids.aminmax()
            raise ValueError(
                f"input_ids holds {int(least)} to {int(most)}: give ids from 0 to "
                f"{self.embed_tokens.num_embeddings - 1}, the vocabulary"
            ) from None


class TitansForCausalLM(TitansPreTrainedModel, TitansGenerationMixin):
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
        check_targets(labels, logits_to_keep, inputs_embeds if input_ids is None else input_ids)
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


AutoConfig.register("titans", TitansConfig)
AutoModel.register(TitansConfig, TitansModel)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM)
