"""Readers: what a stream asks of a model. Titans models, grafts, and every causal LM with a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf import GraftCache, GraftedForCausalLM, TitansCache, TitansForCausalLM
from titans.hf.state_file import StateFile
from titans.state import compact, flatten_alike
from titans.stream.causal import CausalReader, Read
from titans.stream.model import reading, unwrapped


class ReaderCache(Protocol):
    """What a model has read. Reading changes a cache in place; a clone is not changed with it.

    num_columns: tokens read. batch_size: rows, −1 before the first token.
    """

    @property
    def num_columns(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def nbytes(self) -> int: ...

    def clone(self) -> Any: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...


@runtime_checkable
class Reader(Protocol):
    """A model that reads a text piece by piece, in pieces of any length, each text from its first token on.

    How a text is cut changes nothing but rounding. This is what evaluation asks for; a `Session` also
    generates, saves and loads, as both readers of this package do.
    """

    vocab_size: int

    def start(self) -> Any:
        """An empty cache."""

    def read(
        self, ids: Tensor, cache: Any, *, all_logits: bool = False, output_surprise: bool = False
    ) -> Read:
        """Read on: ids (rows, n) int64, all of them real tokens; the cache is changed in place.

        With n = 0 a cache comes to hold the states before the first token, where a model has such.
        """

    def check_room(self, num_tokens: int) -> None:
        """Whether a text may have so many tokens; ValueError naming the limit."""


def reader_of(model: Any) -> Reader:
    """The reader for a model: itself if it is one, else one for its class.

    A Titans model may be compiled, sharded or wrapped by PEFT; so may any other causal LM.

    Raises:
        ValueError: for a model without a cache that another call can go on from, or whose logits depend on
            how the text is cut; names the class and the reason.
    """
    if isinstance(model, Reader):
        return model
    inner = unwrapped(model)
    if isinstance(inner, TitansForCausalLM):
        # PEFT puts its layers into the model it wraps, which therefore is the whole model.
        return TitansReader(inner if hasattr(model, "get_base_model") else model)
    if isinstance(inner, GraftedForCausalLM):
        return GraftReader(inner if hasattr(model, "get_base_model") else model)
    return CausalReader(model)


class StateReader:
    """A model of this library, whose cache holds states: exact however the text is cut.

    freeze_memory: no memory learns.
    """

    # Any number.
    most_tokens: int | None = None

    def __init__(self, model: Any, freeze_memory: bool = False) -> None:
        self.model, self.freeze_memory = model, freeze_memory
        self.inner: Any = unwrapped(model)
        self.vocab_size: int = self.inner.config.vocab_size

    def start(self) -> Any:
        return self.inner.empty_cache()

    def frozen(self) -> Any:
        """A reader with which no memory learns.

        Raises:
            ValueError: for a model without a memory.
        """
        if not self.inner.config.has_memory:
            raise ValueError(
                "freeze_memory=True: this model has no memory that could be frozen; leave it out"
            )
        return type(self)(self.model, freeze_memory=True)

    def read(
        self,
        ids: Tensor,
        cache: Any,
        *,
        all_logits: bool = False,
        output_surprise: bool = False,
        real: Tensor | None = None,
    ) -> Read:
        """As of `Reader`. real: (rows, n) bool, which ids are no padding; None for all."""
        device = self.inner.device
        with reading(self.inner):
            output = self.model(
                input_ids=ids.to(device),
                attention_mask=None if real is None else real.long().to(device),
                past_key_values=cache,
                logits_to_keep=0 if all_logits else 1,
                output_surprise=output_surprise,
                freeze_memory=self.freeze_memory,
            )
        return Read(output.logits if ids.shape[1] else None, output.surprises or None)

    def check_room(self, num_tokens: int) -> None:
        """Any number of tokens."""

    def generate(self, start: Tensor, cache: Any, **kwargs: Any) -> Any:
        """transformers' `generate` from start (rows, n) ids; the cache is changed."""
        with reading(self.inner):
            return self.inner.generate(start.to(self.inner.device), past_key_values=cache, **kwargs)

    def save(self, cache: Any, path: Path, about: dict[str, str]) -> None:
        """Write a cache to a file, with `about` in its header."""
        cache.save(path, about)

    def load(self, file: StateFile) -> Any:
        """The cache in a file, in this model's precision; ValueError where it is not this model's."""
        raise NotImplementedError


class TitansReader(StateReader):
    """A Titans model: at constant memory, with the variant "transformer" growing.

    freeze_memory: see `TitansModel.forward`.
    """

    inner: TitansForCausalLM

    def load(self, file: StateFile) -> TitansCache:
        """The cache in a file, in this model's precision; ValueError where it is not this model's."""
        cache = TitansCache.from_file(file, self.inner.config)
        (wanted, held), structure = flatten_alike((initial_states(self.inner), cache.states))
        leaves = [leaf.to(like.device, like.dtype) for leaf, like in zip(held, wanted, strict=True)]
        states = compact(pytree.tree_unflatten(leaves, structure))
        for layer, state in zip(cache.layers, states, strict=True):
            layer.state = state
        return cache


class GraftReader(StateReader):
    """A pretrained model with a memory: at constant memory."""

    inner: GraftedForCausalLM

    def read(
        self,
        ids: Tensor,
        cache: Any,
        *,
        all_logits: bool = False,
        output_surprise: bool = False,
        real: Tensor | None = None,
    ) -> Read:
        """As of `StateReader`; the surprise of an adaptation alone where there is an association, too: nats
        and squared errors have no common mean."""
        found = super().read(ids, cache, all_logits=all_logits, output_surprise=output_surprise, real=real)
        return replace(found, surprises=found.surprises and found.surprises[-1:])

    def load(self, file: StateFile) -> GraftCache:
        """The cache in a file, in this model's precision; ValueError where it is not this model's."""
        return GraftCache.from_file(file, self.inner.config, self.inner.initial_state(1))


def initial_states(model: TitansForCausalLM) -> tuple[Any, ...]:
    """The states of one row that has read nothing.

    They are made in the model's forward, where sharded parameters are gathered and offloaded ones loaded.
    """
    cache = TitansCache(model.config)
    with reading(model):
        model(torch.zeros(1, 0, dtype=torch.int64, device=model.device), past_key_values=cache)
    assert cache.states is not None
    return cache.states
