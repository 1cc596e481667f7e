"""Table 4: classes of DNA and RNA sequences, on a set that a package holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.baselines.classification import KmerLogistic, SmallCnn
from titans.baselines.systems import system_config
from titans.data.sequences import ALPHABET, LabelledSequence, load_sequences, padded
from titans.experiments.reproduce.claims import Claim, paper
from titans.experiments.reproduce.recipe import Recipe, Variant, variants
from titans.experiments.reproduce.table import Column, title
from titans.experiments.reproduce.tasks import Descent, Learned, TaskTable
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Request
from titans.hf.classification import TitansForSequenceClassification

TASK, CLASSES = "lncrna", 2
KMERS, CNN = "4-mers, logistic regression", "small CNN"
# Of the training sequences, the last so many of a shuffle are for validation.
VALIDATION = 256
ROWS = 16


class Dna(TaskTable):
    """A cell for each system and seed."""

    name = "paper-dna"
    title = "DNA: table 4"
    heading = "The paper's table 4 on another set: long non-coding or messenger RNA, 12,000 transcripts"
    systems = (*variants("lmm"), Variant(KMERS, KMERS), Variant(CNN, CNN), *variants("window", "mac"))
    untrained = (KMERS,)
    tasks = (TASK,)
    full = Recipe("", ("100k",), steps=1500, search_steps=150, batch_size=16, length=2048)
    medium = Recipe("", ("100k",), steps=400, search_steps=60, batch_size=16, length=1024)
    quick = Recipe("", ("100k",), steps=20, search_steps=5, batch_size=8, length=256)
    columns = (Column("accuracy, %", TASK, 1),)

    def tokens(self, request: Request, task: str) -> float:
        recipe = self.recipe(request)
        return recipe.tokens + recipe.length * (4 * VALIDATION + self._tests(request)) / 3

    def _tests(self, request: Request) -> int:
        return {"quick": 256, "medium": 1000, "full": 3600}[request.budget]

    def learn(
        self, learned: Learned, recipe: Recipe, rate: float, steps: int, seed: int
    ) -> tuple[Any, float | None]:
        torch.manual_seed(seed)
        train, validation = parts(seed)
        label = learned.trial.variant.label
        if label == KMERS:
            # Of whole sequences, and of as many as the others read.
            seen = train[: recipe.steps * recipe.batch_size]
            model: Any = KmerLogistic(CLASSES).fit([s.ids for s in seen], [s.label for s in seen])
            return model, accuracy(model, validation, None)
        if label == CNN:
            model = SmallCnn(CLASSES, len(ALPHABET))
        else:
            config: Any = system_config(learned.system, learned.trial.parameters, len(ALPHABET))
            config.num_labels = CLASSES
            model = TitansForSequenceClassification(config)
        generator, descent = np.random.default_rng([seed, 0]), Descent(model.train(), rate, steps)
        for _ in range(steps):
            some = [train[n] for n in generator.integers(len(train), size=recipe.batch_size)]
            labels = torch.tensor([one.label for one in some])
            if not descent.step(F.cross_entropy(logits(model, some, recipe.length), labels)):
                return model, None
        return model.eval(), accuracy(model, validation, recipe.length)

    def test(self, learned: Learned, request: Request, model: Any, score: float, seed: int) -> Numbers:
        held_out = [one for one in sequences() if one.testing]
        chosen = np.random.default_rng(0).permutation(len(held_out))[: self._tests(request)]
        asked, length = [held_out[n] for n in chosen], self.recipe(request).length
        numbers: Numbers = {TASK: 100 * accuracy(model, asked, length)}
        if isinstance(model, KmerLogistic):
            numbers["parameters"] = sum(p.numel() for p in model.layer.parameters())
        return numbers

    def about(self, results: Results) -> str:
        recipe = self.recipe_of(results.budget)
        return (
            f"{self.heading} of the mouse (iLearnPlus, balanced, its own split). GenomicBenchmarks, the "
            f"paper's set, is in no package. Networks read the first {recipe.length:,} letters, a letter a "
            f"token, and were trained on {recipe.steps:,} × {recipe.batch_size} sequences at a learning rate "
            f"of {', '.join(f'{rate:g}' for rate in recipe.rates)}, chosen after {recipe.search_steps:,} "
            "steps; the counts of 1- to 4-mers are of whole sequences. % of held-out sequences that are "
            "right."
        )

    def claims(self) -> list[Claim]:
        here = [
            Claim(
                f"{title('lmm')} classifies transcripts better than {title(than)}",
                "arXiv 2501.00663, table 4, on other data", "lmm", than, TASK,
            )
            for than in (CNN, "window", KMERS)
        ]  # fmt: skip
        reason = "GenomicBenchmarks is in no package"
        return here + [
            Claim(
                f"{title('lmm')} classifies {name} better than {than}", paper("dna")["source"],
                figures=(rows["lmm"][0], rows[row][0]), unavailable=reason,
            )
            for name, rows in paper("dna")["rows"].items()
            for than, row in (("a CNN", "CNN"), ("a transformer", "transformer"))
            if rows["lmm"][0] > rows[row][0]
        ]  # fmt: skip


@cache
def sequences() -> list[LabelledSequence]:
    return load_sequences(TASK)


def parts(seed: int) -> tuple[list[LabelledSequence], list[LabelledSequence]]:
    """Training and validation, in an order that the seed decides."""
    known = [one for one in sequences() if not one.testing]
    order = np.random.default_rng([seed, 1]).permutation(len(known)).tolist()
    count = min(VALIDATION, len(known) // 4)
    return [known[n] for n in order[count:]], [known[n] for n in order[:count]]


def logits(model: Any, some: Sequence[LabelledSequence], length: int) -> Tensor:
    """(sequences, classes)."""
    ids, mask = padded([one.ids for one in some], length)
    found: Any = model(ids) if isinstance(model, SmallCnn) else model(ids, mask.long()).logits
    return found


@torch.no_grad()
def accuracy(model: Any, some: Sequence[LabelledSequence], length: int | None) -> float:
    """The share of sequences whose class is found; sorted by length, so that rows have little padding."""
    ordered, right = sorted(some, key=lambda one: len(one.ids)), 0
    for begin in range(0, len(ordered), ROWS):
        batch = ordered[begin : begin + ROWS]
        if isinstance(model, KmerLogistic):
            found = model.predict([one.ids for one in batch])
        else:
            found = logits(model, batch, length or max(len(one.ids) for one in batch)).argmax(1)
        right += int((found == torch.tensor([one.label for one in batch])).sum())
    return right / len(ordered)
