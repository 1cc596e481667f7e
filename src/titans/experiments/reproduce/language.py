"""Table 1: how well does each system predict text, and what is its state worth?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from titans.baselines.continuous_cache import ContinuousCache, ContinuousCacheReader
from titans.baselines.dynamic_evaluation import DynamicEvaluationReader
from titans.data import encode_document, load_corpus, load_tokenizer
from titans.evaluate import bits_per_byte
from titans.experiments.reproduce.claims import Claim
from titans.experiments.reproduce.recipe import (
    MEDIUM,
    QUICK,
    Recipe,
    Trained,
    Variant,
    speed,
    variants,
)
from titans.experiments.reproduce.table import NOT_BUILT, Column, PaperTable, comparisons, unavailable
from titans.experiments.results import Numbers
from titans.experiments.runner import Request
from titans.hf import TitansConfig

HYBRIDS = ("mac", "mag", "mal")
RECURRENT = ("gated-deltanet", "ttt-linear", "mamba2", "deltanet", "mamba")
OTHER_TEXTS = {"the Bible": "bible", "Moby Dick": "moby-dick", "Python": "python"}
NO_CLASS = "no class of transformers that trains without a GPU"
# What reads through the trained transformer, with a window of its own.
READERS = (
    Variant(
        "transformer with a continuous cache",
        "transformer",
        reader=lambda model: ContinuousCacheReader(model, ContinuousCache(limit=4096), window=256, sinks=0),
    ),
    Variant(
        "transformer with dynamic evaluation",
        "transformer",
        reader=lambda model: DynamicEvaluationReader(
            model, partial(torch.optim.SGD, lr=0.01), segment=32, window=256, sinks=0
        ),
    ),
)


class Language(PaperTable):
    """A cell for each system, size and seed."""

    name = "paper-language"
    title = "Language modelling: table 1"
    heading = "The paper's table 1, scaled down"
    elsewhere = ("learning", "language")
    systems = (
        *variants("lmm", "transformer", "gated-deltanet", "mag", "mal", "mac", "lmm-linear", "window"),
        *variants("lstm", "deltanet", "ttt-linear", "ttt-mlp", "momentum-deltanet", "recurrent-gemma"),
        *READERS,
        *variants("mamba2", "rwkv7", "mamba", "kda"),
    )
    full = Recipe(parameters=("1M", "250k", "4M"))
    decisive = 6
    columns = (
        Column("validation, bits per byte", "validation", 3),
        Column("other texts in one stream", "carried", 3),
        Column("state reset every row", "reset", 3),
        Column("memory frozen", "frozen", 3),
        Column("state, bytes", "state_bytes", 0),
        Column("learning rate", "rate", 3),
    )

    def reading(self, request: Request, variant: Variant, parameters: str) -> float:
        # Three times, each a forward pass: carried, reset and frozen.
        texts, length = self._texts(request)
        return texts * length / speed(variant.system, parameters)

    def _texts(self, request: Request) -> tuple[int, int]:
        """Other texts, and bytes of each that are read."""
        return (1, 2048) if request.quick else (len(OTHER_TEXTS), 16384)

    def read(self, made: Trained, request: Request, seed: int) -> Numbers:
        (count, length), tokenizer = self._texts(request), load_tokenizer(made.tokenizer)
        documents = [
            (encode_document(tokenizer, load_corpus(corpus)[0].data[:length], corpus), length)
            for corpus in [*OTHER_TEXTS.values()][:count]
        ]
        # In one call, because two of the classes read on token by token.
        options: dict[str, Any] = dict(batch_size=1, piece_length=length)
        carried = bits_per_byte(made.reader, documents, **options)
        row, rows = self.recipe(request).length, 1 if isinstance(made.reader, DynamicEvaluationReader) else 8
        reset = bits_per_byte(made.reader, documents, batch_size=rows, context_length=row)
        found: Numbers = {
            "carried": carried.bits_per_byte,
            "reset": reset.bits_per_byte,
            "by_position": [[p.begin, p.bits_per_byte] for p in carried.by_position],
            "state_bytes": state_bytes(made, row),
        }
        if isinstance(config := made.model.config, TitansConfig) and config.has_memory:
            frozen = bits_per_byte(made.model, documents, freeze_memory=True, **options)
            found["frozen"] = frozen.bits_per_byte
        return found

    def claims(self) -> list[Claim]:
        better = {"lmm": [*RECURRENT, "transformer"]}
        better |= {hybrid: ["lmm", "gated-deltanet", "transformer"] for hybrid in HYBRIDS}
        what, column = "predicts text better", "Wiki perplexity"
        return [
            *comparisons("language", "760M", better, what, "carried", column=column, lower=True),
            *unavailable("language", "760M", [*NOT_BUILT.values()], NO_CLASS),
        ]


class LanguageOfWords(Language):
    """The same with a vocabulary of 4,096 tokens, at sizes that its embedding does not fill."""

    name = "paper-language-bpe"
    title = "Language modelling with a BPE vocabulary: table 1"
    heading = "The paper's table 1, scaled down, with a BPE of 4,096 tokens trained on the training documents"
    full = Recipe(parameters=("1M", "4M"), vocabulary=4096)
    medium = replace(MEDIUM, vocabulary=4096)
    quick = replace(QUICK, parameters=("500k",), steps=40, search_steps=10, vocabulary=4096)

    def claims(self) -> list[Claim]:
        return [claim for claim in super().claims() if not claim.unavailable]


def state_bytes(made: Trained, tokens: int) -> int:
    """Bytes that a text's state takes after so many tokens."""
    cache = made.reader.start()
    made.reader.read(torch.zeros(1, tokens, dtype=torch.int64), cache)
    return int(cache.nbytes())
