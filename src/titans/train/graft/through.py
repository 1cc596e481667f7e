"""Training of what a graft has inside its base, residual branches and low-rank changes, through the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.data import Document, encode_document, leading_tokens
from titans.hf.graft.cache import GraftState
from titans.hf.graft.lora import is_lora
from titans.hf.graft.modeling import GraftedForCausalLM
from titans.train.graft.loop import LoopResult
from titans.train.graft.segments import Segments
from titans.train.graft.settings import ThroughTraining
from titans.train.graft.text import HeldOutText, TextTraining
from titans.train.optimizer import decayed_parameters


class ThroughModel(TextTraining):
    """Trains what a graft has inside its base, in place: residual branches and low-rank changes.

    In each step rows of text are read on by a segment; what the window and the memories hold from before is
    carried on without gradients. The loss is the cross-entropy of the graft's predictions, with everything
    that it has.

    Args:
        texts: ids (n,) of each. held_out: the same of others, by name.

    Raises:
        ValueError: for a graft with nothing inside its base, settings that cannot be used, or short texts.
    """

    settings: ThroughTraining

    def __init__(
        self,
        grafted: GraftedForCausalLM,
        texts: Sequence[Tensor],
        held_out: dict[str, Tensor],
        folder: Path,
        settings: ThroughTraining | None = None,
    ) -> None:
        settings = settings or ThroughTraining()
        settings.check()
        branches = {name: p for name, p in grafted.named_parameters() if name.startswith("residual.")}
        adapters = [p for name, p in grafted.named_parameters() if is_lora(name)]
        if not branches and not adapters:
            raise ValueError(
                "this graft has nothing inside its base to train: make it with titans.graft(…, residual=True)"
            )
        decayed = {*decayed_parameters(grafted)}
        kinds = (
            (
                [p for name, p in branches.items() if name in decayed],
                settings.branch_rate,
                settings.weight_decay,
            ),
            ([p for name, p in branches.items() if name not in decayed], settings.branch_rate, 0.0),
            (adapters, settings.lora_rate, 0.0),
        )
        groups = [{"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in kinds if p]
        super().__init__(grafted, groups, folder, settings)
        # A label follows the last token of a segment.
        self.segments = Segments(
            [len(ids) - 1 for ids in texts], settings.rows, settings.tokens, settings.seed
        )
        self.grafted, self.texts = grafted, texts
        most = settings.held_out_tokens
        self.held_out = {name: ids[:most] for name, ids in held_out.items() if len(ids) > 1}
        if not self.held_out:
            raise ValueError("held_out: none of the texts has two tokens; give longer ones")
        self._base = {name: self._base_loss(ids) for name, ids in self.held_out.items()}
        self._state = grafted.initial_state(settings.rows)

    def depends_on(self) -> dict[str, Any]:
        config = self.grafted.config
        return {
            "base": config.origin["weights"],
            "residual": config.residual,
            "lora": config.lora,
            "texts": _digest([*self.texts, *self.held_out.values()]),
        }

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        segments, count = self.segments.at(step), self.settings.tokens
        begins = [one.begin == 0 for one in segments]
        if any(begins):
            self._state = self._begun(begins)
        ids = torch.stack([self.texts[one.text][one.begin : one.begin + count + 1] for one in segments])
        ids = ids.to(self.grafted.device)
        cache = self.grafted.empty_cache()
        cache.store((self._state,), 0)
        logits = self.grafted(ids[:, :-1], past_key_values=cache).logits
        assert cache.state is not None
        self._state = cache.state
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()), {}

    def _begun(self, rows: Sequence[bool]) -> GraftState:
        """The state with a new text's in these rows."""
        fresh = self.grafted.initial_state(1)
        return GraftState.joined(
            [
                fresh if begins else self._state.row(row, self.grafted.config)
                for row, begins in enumerate(rows)
            ]
        )

    @torch.no_grad()
    def evaluate(self) -> HeldOutText:
        losses = {}
        for name, ids in self.held_out.items():
            cache, ids, total = self.grafted.empty_cache(), ids.to(self.grafted.device), 0.0
            for begin in range(0, len(ids) - 1, self.settings.tokens):
                labels = ids[begin + 1 : begin + self.settings.tokens + 1]
                logits = self.grafted(ids[None, begin : begin + len(labels)], past_key_values=cache).logits[0]
                total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            losses[name] = total / (len(ids) - 1)
        return HeldOutText(losses, self._base)

    @torch.no_grad()
    def _base_loss(self, ids: Tensor) -> float:
        """Of the base in its window, without anything that a graft adds."""
        ids, window, total = ids.to(self.grafted.device), None, 0.0
        for begin in range(0, len(ids) - 1, self.settings.tokens):
            labels = ids[begin + 1 : begin + self.settings.tokens + 1]
            logits, window = self.grafted.read_base(ids[None, begin : begin + len(labels)], window)
            total += float(F.cross_entropy(logits[0].float(), labels, reduction="sum"))
        return total / (len(ids) - 1)


def _digest(texts: Sequence[Tensor]) -> str:
    """A name for these ids, in this order."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(len(ids).to_bytes(8, "little") + ids.to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fit_through(
    grafted: GraftedForCausalLM,
    documents: Sequence[Document],
    held_out: Sequence[Document],
    output: Path,
    *,
    tokenizer: Any = None,
    training: ThroughTraining | None = None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
) -> LoopResult[HeldOutText]:
    """Train a graft's residual branches and low-rank changes through its base, and save the graft.

    It runs where the base is, in the base's precision; branches and low-rank changes are in float32 at least.
    The same call continues what was interrupted. At the end the graft has the weights that are best on the
    held-out documents, those from before the training if none are.

    Args:
        grafted: with `residual` or `lora`; changed in place.
        documents, held_out: for training, and for deciding what is best; they must share nothing.
        output: folder for the graft, its checkpoints and metrics.jsonl.
        tokenizer: by default the graft's own.

    Raises:
        ValueError: for a graft with nothing inside its base, texts that are too short, or a folder of another
            training.
        FloatingPointError: if a loss is not finite.
        OSError: if a folder cannot be written.
    """
    tokenizer = grafted.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: the graft has none; give the base's own")

    def ids_of(document: Document) -> Tensor:
        ids = encode_document(tokenizer, document.data, document.name)
        return torch.tensor([*leading_tokens(tokenizer), *ids.tolist()])

    texts, others = [ids_of(one) for one in documents], {one.name: ids_of(one) for one in held_out}
    result = ThroughModel(grafted, texts, others, output, training).run(on_log)
    if result.finished:
        if grafted.tokenizer is None:
            grafted.tokenizer = tokenizer
        grafted.save_pretrained(output)
    return result
