"""What do trained grafts recall after texts of some lengths, and what do they do to texts?

Facts and texts are others than those of training, and than those that chose the settings and the best step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from titans.data import Document, load_corpus
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import interval, markdown, percent
from titans.experiments.trained import hash_of_graft
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.feature_cache import FeatureCache, Features, write_features
from titans.hf.graft.modeling import GraftedForCausalLM
from titans.hf.graft.window import Window
from titans.train.graft.features import episodes_of, fact_units, text_units
from titans.train.graft.held_out import text_change
from titans.train.graft.recall import recall_after
from titans.train.graft.settings import FeatureSettings
from titans.zoo import load
from titans.zoo.by_name import graft_names
from titans.zoo.precision import convert

# In no training, and no choice. The text between facts and questions is the end of the first two.
SOURCES = (
    "austen/northanger-abbey", "excerpt/the-tempest-act-[12]", "state-of-the-union/2010*",
    "essays/essays-045", "encyclopaedia/encyclopaedia-500",
)  # fmt: skip
WORDINGS = {"known wordings": False, "new wordings": True}
LENGTHS, QUICK_LENGTHS = (1024, 4096, 16384), (256,)
TEXTS = "texts"
SEED = 20261130
QUICK = FeatureSettings(held_out_episodes=4, document_tokens=512)
FULL = FeatureSettings(held_out_episodes=128)


class GraftTraining(Experiment):
    """For each trained graft a cell with each kind of wording, and one with texts."""

    name = "graft-training"
    title = "What trained grafts recall"
    unit = 1.0

    def cells(self, request: Request) -> list[Cell]:
        places = request.models or {name: name for name in graft_names()}
        hashes = {name: hash_of_graft(place) for name, place in places.items()}
        return [
            Cell(f"{name}, {what}", (place, what), cost=120, conditions={"weights": hashes[name]})
            for name, place in places.items()
            for what in (*WORDINGS, TEXTS)
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        folder, what = cell.settings
        grafted, tokenizer = load(folder)
        association = grafted.association if isinstance(grafted, GraftedForCausalLM) else None
        if association is None:
            raise ValueError(f"{folder} is no graft with an association: give such a folder in --models")
        grafted = grafted.to(torch.device(request.device))
        convert(grafted.base, torch.bfloat16)  # As in training.
        base = WindowedBase(grafted.base, Window(grafted.config.window, grafted.config.sinks))
        cache = features(base, tokenizer, association.layers, request, progress)
        texts = {cache.about(path): cache.load(path)["text"] for path in cache.files(TEXTS)}
        if what == TEXTS:
            return {name: text_change(association, base.head, text) for name, text in texts.items()}
        between = joined([*texts.values()])
        lengths = QUICK_LENGTHS if request.quick else LENGTHS
        found = recall_after(association, base.head, cache, what, between, lengths)
        return {str(length): [int(hits.sum()), len(hits)] for length, hits in found.items()}

    def table(self, results: Results) -> str:
        """Recall, then changes of texts; over several grafts mean and interval."""
        recall, changes = [], []
        labels = list(dict.fromkeys(name.rpartition(", ")[0] for name in results.cells))
        for what in WORDINGS:
            found = [c for label in labels if (c := results.cells.get(f"{label}, {what}"))]
            lengths = [key for key in found[0] if key.isdigit()] if found else []
            if found and not recall:
                recall.append(["recalled, %", *(f"after {int(n):,} tokens" for n in lengths)])
            if found:
                recall.append([what, *(_shares([c[n] for c in found]) for n in lengths)])
            if len(found) > 1:
                recall += [
                    [
                        f"{what}, {label} alone",
                        *(_shares([results.cells[f"{label}, {what}"][n]]) for n in lengths),
                    ]
                    for label in labels
                    if f"{label}, {what}" in results.cells
                ]
        texts = [c for label in labels if (c := results.cells.get(f"{label}, {TEXTS}"))]
        if texts:
            changes = [["document", "change of nats, %"]]
            changes += [
                [name, interval([100 * c[name] for c in texts], 3)] for name in texts[0] if name != "weights"
            ]
        about = (
            f"Grafts: {', '.join(labels)}; the base in bfloat16. About 14 facts are stated in 512 tokens, "
            "then the graft reads other text, then all are asked for. A fact is recalled if each token of "
            "its value is the likeliest, given those before it and, before the question, others of its group "
            "with their right answers. That is easier than in [graft-comparison](graft-comparison.md), where "
            "answers are generated whole, each from its question alone, after other texts: compare no share "
            "here with one there. Names, values and texts are in no training and chose nothing. "
            + (
                "Mean over grafts ± 95 % interval; of one alone with its interval (Wilson)."
                if len(labels) > 1
                else "With 95 % intervals (Wilson)."
            )
        )
        return "\n\n".join([about, *(markdown(t[0], t[1:]) for t in (recall, changes) if t)])


def _shares(found: Sequence[Sequence[int]]) -> str:
    if len(found) == 1:
        return percent(*found[0])
    return interval([100 * hits / count for hits, count in found])


def documents() -> list[Document]:
    """One document for each source; several of one are joined."""
    found = ((source, load_corpus(source)) for source in SOURCES)
    return [Document(source, b"".join(d.data for d in some)) for source, some in found]


def features(
    base: WindowedBase, tokenizer: object, layers: Sequence[int], request: Request, progress: Progress
) -> FeatureCache:
    """Of facts in both kinds of wording, and of texts; computed once, and kept in `request.work`."""
    settings = QUICK if request.quick else FULL
    texts = documents()
    source = episodes_of(tokenizer, texts, texts, settings)
    count = settings.held_out_episodes
    units = [
        unit
        for what, new in WORDINGS.items()
        for unit in fact_units(what, source, count, SEED, held_out=True, held_out_wording=new)
    ]
    most = len(texts) * settings.document_tokens
    units += [unit for _, unit in text_units(tokenizer, texts, TEXTS, settings, most)][: len(texts)]
    folder = Path(request.work) / f"features-{base.model.dtype}".replace("torch.", "")
    return write_features(base, units, folder, layers, lambda p: progress(p.tokens, p.total))


def joined(texts: Sequence[Features]) -> Features:
    """Texts of one row, one after the other; the first comes last."""

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts[::-1], 1)

    states = tuple(join(*layer) for layer in zip(*(text.states for text in texts), strict=True))
    rest = [(t.hidden, t.ids, t.flags, t.normaliser) for t in texts]
    return Features(states, *(join(*parts) for parts in zip(*rest, strict=True)))
