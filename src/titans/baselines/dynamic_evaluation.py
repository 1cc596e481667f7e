"""Dynamic evaluation: a pretrained model takes gradient steps on what it reads.

Krause, Kahembwe, Murray and Renals, "Dynamic evaluation of neural sequence models", 2018. All weights learn,
or those of a LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from titans.baselines.windowed import WindowedCache, WindowedReader
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.lora import sharing_weights
from titans.hf.graft.window import WindowState
from titans.state import map_state

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass
class _Learner:
    """The weights that learn, by their names in the model, and their optimizer."""

    weights: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    def copy(self) -> _Learner:
        # In one copy, so that the optimizer's copy holds the copied weights.
        return _Learner(*copy.deepcopy((self.weights, self.optimizer)))

    def nbytes(self) -> int:
        moments = [x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        return sum(x.nbytes for x in (*self.weights.values(), *moments))


class _Cache(WindowedCache):
    """With the weights that learn, and the segment that is not complete yet.

    learner: shared by clones until one of them learns. pending: (1, n) ids since `before`, the window at the
    segment's start.
    """

    def __init__(self, learner: _Learner) -> None:
        super().__init__()
        self.learner, self.shared = learner, False
        self.pending = torch.zeros(1, 0, dtype=torch.int64)
        self.before: WindowState | None = None

    def memory_nbytes(self) -> int:
        return self.learner.nbytes()

    def clone(self) -> _Cache:
        self.shared = True
        return copy.copy(self)


class DynamicEvaluationReader(WindowedReader):
    """A pretrained model with a window whose weights learn while it reads.

    A text is cut into segments from its first token on. The weights at a segment's start predict all its
    tokens. When it is complete, one step of the optimizer follows, on the segment's mean loss (without that
    of its first token, which the segment before predicts). Gradients do not reach earlier segments. The
    weights, in the model's precision, are part of the cache; the model is not changed.

    Args:
        model, window, sinks: of `WindowedReader`.
        optimizer: makes the optimizer of the weights that learn.
        segment: tokens, a divisor of window / 2.
        names: which of the model's parameters learn; None for all.

    Raises:
        ValueError: for a segment or names that do not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: MakeOptimizer,
        *,
        segment: int = 64,
        names: list[str] | None = None,
        window: int = 512,
        sinks: int = 4,
    ) -> None:
        super().__init__(model, window=window, sinks=sinks)
        if segment < 2 or (window // 2) % segment:
            raise ValueError(
                f"segment={segment}: give a divisor of {window // 2}, half the window, from 2 on"
            )
        known = dict(model.named_parameters())
        if names is not None and (unknown := [name for name in names if name not in known]):
            raise ValueError(f"names: {type(model).__name__} has no parameter {unknown[0]!r}")
        self.segment, self.make_optimizer = segment, optimizer
        self.names = list(known) if names is None else names
        self._predictor = _Predictor(self.windowed)

    def start(self) -> Any:
        """An empty cache, with a copy of the weights that learn."""
        known = dict(self.model.named_parameters())
        weights = {name: known[name].detach().clone().requires_grad_() for name in self.names}
        return _Cache(_Learner(weights, self.make_optimizer([*weights.values()])))

    def _read(self, ids: Tensor, cache: Any, all_logits: bool) -> Tensor:
        if len(ids) != 1:
            raise ValueError(f"ids has {len(ids)} rows: dynamic evaluation reads one text at a time")
        logits = []
        while ids.shape[1]:
            room = self.segment - cache.pending.shape[1]
            some = self._read_part(ids[:, :room], cache)
            logits = [*logits, some] if all_logits else [some[:, -1:]]
            ids = ids[:, room:]
        return torch.cat(logits, 1)

    def _read_part(self, ids: Tensor, cache: _Cache) -> Tensor:
        """Read within a segment, and learn where it ends."""
        if not cache.pending.shape[1]:
            cache.before = cache.window
        assert cache.window is not None and cache.before is not None
        whole = ids.shape[1] == self.segment
        wide = torch.promote_types(self.model.dtype, torch.float32)
        with torch.set_grad_enabled(whole):
            logits, window = self._predict(cache.learner, ids, cache.window)
        cache.window, cache.pending = map_state(Tensor.detach, window), torch.cat([cache.pending, ids], 1)
        if cache.pending.shape[1] == self.segment:
            if cache.shared:
                cache.learner, cache.shared = cache.learner.copy(), False
                whole = False
            with torch.enable_grad():
                again = logits if whole else self._predict(cache.learner, cache.pending, cache.before)[0]
                loss = F.cross_entropy(again[0, :-1].to(wide), cache.pending[0, 1:])
            cache.learner.optimizer.zero_grad()
            with torch.enable_grad():
                loss.backward()
            cache.learner.optimizer.step()
            cache.learner.optimizer.zero_grad()
            cache.pending = cache.pending[:, :0]
        return logits.detach()

    def _predict(self, learner: _Learner, ids: Tensor, window: WindowState) -> tuple[Tensor, WindowState]:
        weights = {f"model.{name}": weight for name, weight in learner.weights.items()}
        found = torch.func.functional_call(self._predictor, weights, (ids, window))
        return cast("tuple[Tensor, WindowState]", found)


class _Predictor(nn.Module):
    """A windowed base as a module, so that it can be called with other weights than its own."""

    def __init__(self, windowed: WindowedBase) -> None:
        super().__init__()
        self.model, self.windowed = windowed.model, windowed

    def forward(self, ids: Tensor, window: WindowState) -> tuple[Tensor, WindowState]:
        hidden, window = self.windowed.read(ids, window)
        linear: Any = self.model.get_output_embeddings()
        return replace(self.windowed.head, weight=linear.weight, bias=linear.bias).logits(hidden), window


def with_lora(model: PreTrainedModel, rank: int = 8, seed: int = 0) -> tuple[PreTrainedModel, list[str]]:
    """The model with a LoRA of PEFT in every linear layer but the head, and the names of its parameters.

    The LoRA's output is 0 at first. The model given is not changed; its weights are shared.

    Raises:
        ImportError: without the package peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ImportError(f"LoRA: {error}; pip install peft", name=error.name) from None
    copied = sharing_weights(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        inject_adapter_in_model(settings, copied)
    return copied, [name for name, _ in copied.named_parameters() if "lora_" in name]
