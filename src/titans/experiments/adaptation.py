"""How much does the adaptation of SmolLM2 gain on three documents, without training?

The model's hidden states on a document are computed once and saved; every variant reads these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans.experiments.held_out import BOOK, CODE, PLAY, documents, tempest
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.window import Window
from titans.nn.adaptation import Adaptation, FunctionHead, Head, LinearHead
from titans.zoo import load
from titans.zoo.by_name import PRETRAINED

WINDOW, SINKS = 512, 4
# Positions between which losses are averaged.
RANGES = ((0, 512), (512, 2048), (2048, 8192), (8192, 16384))
QUICK_TOKENS, TOKENS = 1024, 16384
TUNED_ON = BOOK

# Settings of variants without a warm-up that differ from the adaptation's defaults. This file handles
# `whitened`, and `all`: the curvature bound that holds for all predictions.
_AT_ONCE: dict[str, dict[str, Any]] = {
    "no warm-up": {},
    **{f"chunks of {size}": dict(chunk_size=size) for size in (16, 64, 128, 256)},
    "chunks of 16 with step 0.5": dict(chunk_size=16, step=0.5),
    "the matrix alone": dict(ratio=1e9),
    "the bias alone": dict(ratio=1e-9),
    "step 0.5": dict(step=0.5),
    "ratio 1": dict(ratio=1.0),
    "ratio 10": dict(ratio=10.0),
    "whitened inputs": dict(whitened=True),
    "curvature of all predictions": dict(all=True, step=0.99),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{name: {"warm_up": 0, **settings} for name, settings in _AT_ONCE.items()},
}
QUICK = ("default", "the matrix alone", "the bias alone")


class AdaptationGains(Experiment):
    name = "adaptation"
    title = "What the adaptation gains without training"

    def cells(self, request: Request) -> list[Cell]:
        variants = QUICK if request.quick else VARIANTS
        known = documents()
        return [Cell(f"{d}, {v}", (d, v)) for d in (TUNED_ON, PLAY, CODE) if d in known for v in variants]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        document, variant = cell.settings
        settings = dict(VARIANTS[variant])
        hidden, ids, weight = self.states(document, request, progress)
        head: Head = LinearHead(weight)
        adaptation = Adaptation(
            weight.shape[1],
            weight.shape[0],
            LinearHead(weight).row_variance(),
            **{name: value for name, value in settings.items() if name not in ("whitened", "all")},
        )
        if settings.get("whitened"):
            adaptation.whiten(self.states("The Tempest", request, progress)[0])
        if settings.get("all"):
            radius = (weight - weight.mean(0)).square().sum(-1).max()
            head = FunctionHead(head.logits, float(radius))
        adapted, plain = [], []
        with torch.no_grad():
            for losses, base in _losses(adaptation, head, hidden, ids):
                adapted.append(losses)
                plain.append(base)
                progress(sum(map(len, adapted)), ids.shape[1])
        # The first token has no prediction.
        return {"adapted": _means(torch.cat(adapted)[1:]), "window": _means(torch.cat(plain)[1:])}

    def states(self, document: str, request: Request, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """The head's inputs (1, time, hidden), the ids (1, time), and the head's weight.

        They are computed once, and saved in `request.work` in float16.
        """
        texts = {**documents(), "The Tempest": tempest}
        count = QUICK_TOKENS if request.quick else TOKENS // 4 if document == "The Tempest" else TOKENS
        path = request.work / f"{document.replace(' ', '-').lower()}-{count}.safetensors"
        if not path.is_file():
            model, tokenizer = load(PRETRAINED)
            ids = tokenizer(texts[document](), return_tensors="pt")["input_ids"][:, :count]
            base = WindowedBase(model.float().cpu(), Window(WINDOW, SINKS))
            state, found = base.initial_state(1), []
            with torch.no_grad():
                for piece in ids.split(WINDOW // 2, 1):
                    hidden, state = base.read(piece, state)
                    found.append(hidden.half())
                    progress(sum(x.shape[1] for x in found), ids.shape[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            weight = base.head.weight.detach().half()
            unfinished = path.with_suffix(".part")
            save_file({"hidden": torch.cat(found, 1), "ids": ids, "weight": weight}, unfinished)
            unfinished.replace(path)
        kept = load_file(path)
        return kept["hidden"].float(), kept["ids"], kept["weight"].float()

    def table(self, results: Results) -> str:
        cells = results.cells
        documents = list(dict.fromkeys(name.rpartition(", ")[0] for name in cells))
        parts = [
            f"{PRETRAINED} (SmolLM2-135M-Instruct, dequantised from 4 bits) with a window of {WINDOW} tokens "
            "reads each document; nothing is trained. Columns are ranges of tokens. The first row is the "
            "mean loss of the window alone, in nats; the others are the relative change of that loss with "
            "the adaptation, in %, negative being better. "
            f"Settings were chosen on {TUNED_ON} alone, and then the default's warm-up, which the others do "
            f"not have, on the first 2,048 tokens of {PLAY}, {TUNED_ON} and a Python file."
        ]
        for document in documents:
            mine = {v: cells[f"{document}, {v}"] for v in VARIANTS if f"{document}, {v}" in cells}
            window = next(iter(mine.values()))["window"]
            head = [document, *(f"{a:,}–{b:,}" for a, b in RANGES[: len(window)])]
            rows = [["window alone (nats)", *(f"{x:.3f}" for x in window)]]
            for variant, cell in mine.items():
                changes = zip(cell["adapted"], cell["window"], strict=True)
                rows.append([variant, *(f"{100 * (a / b - 1):+.2f}" for a, b in changes)])
            parts.append(markdown(head, rows))
        return "\n\n".join(parts)


def _losses(
    adaptation: Adaptation, head: Head, hidden: Tensor, ids: Tensor, piece: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """The loss of each token with the adaptation and without, 0 for the first, piece by piece."""
    state, last = None, hidden[0, :0]
    for start in range(0, ids.shape[1], piece):
        part = slice(start, start + piece)
        _, state, losses = adaptation(hidden[:, part], ids[:, part], head, state, keep=1, surprise=True)
        assert losses is not None
        before = torch.cat([last, hidden[0, part]])[:-1]
        base = F.cross_entropy(head.logits(before), ids[0, part][-len(before) :], reduction="none")
        last = hidden[0, part][-1:]
        yield losses[0], torch.cat([base.new_zeros(losses.shape[1] - len(base)), base])


def _means(losses: Tensor) -> list[float]:
    return [float(losses[a:b].mean()) for a, b in RANGES if a < len(losses)]
