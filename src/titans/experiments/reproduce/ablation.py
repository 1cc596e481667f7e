"""Table 5 and figures 7 and 8: which part of the memory matters, and how deep it should be."""

from __future__ import annotations

import itertools

import numpy as np

from titans.data import load_corpus
from titans.evaluate import bits_per_byte
from titans.experiments.reproduce.claims import Claim
from titans.experiments.reproduce.needles import FULL, MEDIUM, RECALLS_NOTHING, SHORT, Needles
from titans.experiments.reproduce.recipe import Recipe, Trained, Variant, variants
from titans.experiments.reproduce.table import Column, PaperTable, comparisons
from titans.experiments.results import Numbers
from titans.experiments.runner import Request

PARTS = (
    Variant("linear memory", "lmm", {"memory_depth": 1}),
    Variant("without convolution", "lmm", {"memory": {"conv_kernel": 1}}),
    Variant("without momentum", "lmm", {"memory": {"form": {"max_momentum": 0.0}}}),
    # So long that in float32 nothing is forgotten.
    Variant("without forgetting", "lmm", {"memory": {"half_lives": [1e30, 1e30]}}),
    Variant("without persistent tokens", "lmm", {"num_persistent_tokens": 0}),
)
BOOK_BYTES = 16384


class Ablation(Needles):
    """A cell for each variant and seed: text and needles after one training. Reasoning is not measured."""

    name = "paper-ablation"
    title = "Ablation: table 5"
    heading = "The paper's table 5; persistent tokens, momentum and so on left out of Titans (LMM)"
    elsewhere = ("forms",)
    systems = (*variants("lmm"), *PARTS, *variants("mac", "mag", "mal"))
    full, medium, quick = FULL, MEDIUM, SHORT
    lengths, medium_lengths = (2048, 8192), (1024, 2048)
    columns = (Column("text, bits per byte", "carried", 3), *Needles.columns)

    def read(self, made: Trained, request: Request, seed: int) -> Numbers:
        book = load_corpus("bible")[0].data[: 2048 if request.quick else BOOK_BYTES]
        read = bits_per_byte(made.reader, [(np.frombuffer(book, np.uint8), len(book))], batch_size=1)
        return super().read(made, request, seed) | {"carried": read.bits_per_byte}

    def claims(self) -> list[Claim]:
        without = {"lmm": [part.label for part in PARTS]}
        hybrids = {hybrid: ["lmm"] for hybrid in ("mac", "mag", "mal")}
        # The authors' order of the parts, by what is lost.
        order = ["without forgetting", "without momentum", "without convolution", "without persistent tokens"]
        worse = {after: [before] for before, after in itertools.pairwise(order)}
        text, recall = "language perplexity", "long-context accuracy"
        reasoning = (
            "the paper's tasks are not in any package; the accuracies need models a thousand times larger"
        )
        return [
            *(
                claim
                for better in (without, hybrids, worse)
                for claim in comparisons(
                    "ablation", "400M", better, "predicts text better", "carried", column=text, lower=True
                )
            ),
            *(
                claim
                for better in (without, hybrids)
                for claim in comparisons(
                    "ablation", "400M", better, "recalls more", "mean", column=recall, floor=RECALLS_NOTHING
                )
            ),
            Claim("The column of reasoning", "arXiv 2501.00663, table 5", unavailable=reasoning),
        ]


class Depth(PaperTable):
    """A cell for each depth, size and seed."""

    name = "paper-depth"
    title = "Depth of the memory: figures 7 and 8"
    heading = "The paper's figures 7 and 8; Titans (LMM) with memories of one to four layers"
    elsewhere = ("memory-forms",)
    systems = tuple(Variant(f"depth {depth}", "lmm", {"memory_depth": depth}) for depth in (1, 2, 3, 4))
    full = Recipe(parameters=("250k", "1M", "4M"))
    columns = (
        Column("validation, bits per byte", "validation", 3),
        Column("the Bible in one stream", "carried", 3),
        Column("tokens a second of training", "speed", 0),
    )

    def read(self, made: Trained, request: Request, seed: int) -> Numbers:
        book = load_corpus("bible")[0].data[: 2048 if request.quick else BOOK_BYTES]
        read = bits_per_byte(made.reader, [(np.frombuffer(book, np.uint8), len(book))], batch_size=1)
        tokens = self.recipe(request).tokens
        return {"carried": read.bits_per_byte, "speed": tokens / made.numbers["training_seconds"]}

    def claims(self) -> list[Claim]:
        pairs = [(f"depth {n + 1}", f"depth {n}") for n in (1, 2, 3)]
        return [
            *(
                Claim(
                    f"{deep} predicts text better than {shallow}", "arXiv 2501.00663, figure 7",
                    deep, shallow, "carried", lower=True,
                )
                for deep, shallow in pairs
            ),
            *(
                Claim(
                    f"{shallow} trains faster than {deep}", "arXiv 2501.00663, figure 8",
                    shallow, deep, "speed",
                )
                for deep, shallow in pairs
            ),
        ]  # fmt: skip
