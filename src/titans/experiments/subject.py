"""A trained model that is asked for facts in many texts side by side, and interventions on its memories."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.data.needles import TASKS, Needles, make_needles
from titans.evaluate.ask import answered, read
from titans.memory import MemoryState
from titans.nn import NeuralMemory

TEXTS = 60
CONTEXT = 4096
Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model that is asked; texts: how many at a time."""

    model: Any
    tokenizer: Any
    texts: int = TEXTS

    @property
    def memories(self) -> list[NeuralMemory]:
        return [module for module in self.model.modules() if isinstance(module, NeuralMemory)]

    def with_gates(self, step_size: Sequence[Gate | float], forget: Sequence[float] | None = None) -> Subject:
        """A model of the same weights with other gates: each memory's step size through a function or times a
        number, and its forgetting times a number."""
        weights = (*self.model.parameters(), *self.model.buffers())
        other = replace(self, model=copy.deepcopy(self.model, {id(weight): weight for weight in weights}))
        forget = [1.0] * len(step_size) if forget is None else forget
        for memory, of_step_size, of_forget in zip(other.memories, step_size, forget, strict=True):
            memory.step_size_gate = ChangedGate(memory.step_size_gate, of_step_size)
            memory.forget_gate = ChangedGate(memory.forget_gate, of_forget)
        return other

    def read(self, texts: Sequence[bytes], cache: Any = None, piece_length: int = CONTEXT) -> Any:
        """The cache after texts of one length; the one given is not changed."""
        ids = np.stack([np.frombuffer(text, np.uint8) for text in texts])
        return read(self.model, ids, None if cache is None else cache.clone(), piece_length)[1]

    def recalled(self, needles: Sequence[Needles], cache: Any) -> tuple[int, int]:
        """How many of the rows of a cache are followed by the right answer, and of how many."""
        questions, answers = ([getattr(n, part)[0] for n in needles] for part in ("questions", "answers"))
        return int(answered(self.model, self.tokenizer, cache, questions, answers).sum()), len(needles)

    def facts(self, task: str, seed: int = 0) -> list[Needles]:
        return [make_needles(TASKS[task], np.random.default_rng([seed, row])) for row in range(self.texts)]

    def slices(self, text: bytes, length: int, seed: int) -> list[bytes]:
        """One for each fact, from anywhere in the text."""
        starts = np.random.default_rng(seed).integers(len(text) - length, size=TEXTS)[: self.texts]
        return [text[at : at + length] for at in starts.tolist()]

    @torch.no_grad()
    def look(self, texts: Sequence[bytes]) -> tuple[Sequence[Tensor], Tensor]:
        """Each memory's surprises (texts, bytes, heads), and nats of all bytes but the first."""
        ids = torch.tensor([list(text) for text in texts])
        output = self.model(ids, use_cache=False, output_surprise=True)
        nats = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return output.surprises, nats


def statement(needles: Needles) -> bytes:
    return needles.statements[0].encode()


def last_bytes(texts: Sequence[bytes], length: int) -> list[bytes]:
    """Texts of one length, cut at their beginnings."""
    return [text[len(text) - length :] for text in texts]


def surprise_levels(surprises: Sequence[Tensor]) -> Tensor:
    """Surprise over its mean, (texts, bytes), the mean of all layers and heads."""
    return torch.stack([(s / s.mean((0, 1))).mean(-1) for s in surprises]).mean(0)


class ChangedGate(nn.Module):
    """A gate of a memory whose values go through a function, or are multiplied by a number."""

    def __init__(self, gate: nn.Module, change: Gate | float) -> None:
        super().__init__()
        self.gate, self.change = gate, change

    def forward(self, x: Tensor) -> Tensor:
        opened = self.gate(x)
        return self.change(opened) if callable(self.change) else opened * self.change


def only_where(mask: Tensor) -> Gate:
    """A gate that is 0 where the mask (batch, time, heads) is, in calls of its shape."""
    return lambda gate: gate * mask.unsqueeze(-1) if gate.shape[:2] == mask.shape[:2] else gate


def with_head_of(cache: Any, other: Any, layer: int, head: int, shift: int) -> Any:
    """A copy of the cache with one head's memory from another's, whose rows are moved on by so many."""
    count = itertools.count()

    def exchanged(mine: Any, theirs: Any) -> Any:
        if not isinstance(mine, MemoryState) or next(count) != layer:
            return mine
        return pytree.tree_map(one_head, mine, theirs)

    def one_head(mine: Tensor, theirs: Tensor) -> Tensor:
        if mine.dim() == 1:  # the position, which all heads share
            return mine
        moved = theirs.roll(shift, 0)
        return torch.cat([mine[:, :head], moved[:, head : head + 1], mine[:, head + 1 :]], 1)

    copied = cache.clone()
    memory = {"is_leaf": lambda state: isinstance(state, MemoryState)}
    copied.store(pytree.tree_map(exchanged, cache.states, other.states, **memory), 0)
    return copied
