"""Table 2: what does each system recall from long texts? And figure 6: stories in books."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from titans.data import byte_tokenizer
from titans.evaluate.needle import needle_table
from titans.experiments.reproduce.claims import Claim
from titans.experiments.reproduce.recipe import FORWARD, QUICK, Recipe, Trained, Variant, speed, variants
from titans.experiments.reproduce.table import Column, PaperTable, comparisons, mean_of
from titans.experiments.results import Numbers
from titans.experiments.runner import Request
from titans.experiments.trained import haystack
from titans.train import FactSettings

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)
# Characters of the haystack: more than any length, and few enough to be encoded anew for every task.
HAYSTACK, QUICK_HAYSTACK = 2**20, 2**16
# Facts are stated and asked for within a row, most answers counting as ten bytes of text.
FACTS = FactSettings(spacing=100.0, distance=384, alike=0.25, answer_weight=10.0)
FULL = Recipe(length=512, batch_size=8, steps=600, search_steps=150, facts=FACTS)
MEDIUM = replace(FULL, steps=200, search_steps=40, validation=16384)
# Facts are inserted anew for every training, which takes a while in all of Shakespeare.
SHORT = replace(QUICK, data="excerpt", length=256, batch_size=4, facts=FACTS)
# Processor seconds for a text and its question, whatever their length: 5 to 20 bytes one by one.
QUESTION_SECONDS = 0.2
# % of questions; two systems that answer fewer cannot be compared.
RECALLS_NOTHING = 2.0


@cache
def book(length: int) -> str:
    """So many characters of the haystack."""
    return haystack()[:length]


class Needles(PaperTable):
    """A cell for each system and seed. All lengths are longer than a row of the training."""

    name = "paper-needles"
    title = "Needles in a haystack: table 2"
    heading = "The paper's table 2 (S-NIAH), one byte a token, the haystack the Bible"
    elsewhere = ("recall", "family")
    systems = variants(
        "lmm", "ttt-linear", "mamba2", "deltanet", "mac", "mag", "mal", "gated-deltanet", "lmm-linear",
        "transformer", "window", "lstm", "momentum-deltanet", "ttt-mlp", "rwkv7", "recurrent-gemma",
    )  # fmt: skip
    full, medium, quick = FULL, MEDIUM, SHORT
    tasks = ("passkey", "number", "word")
    lengths, medium_lengths, quick_lengths = (2048, 4096, 8192, 16384), (1024, 4096), (512,)
    columns = (
        *(Column(task, task, 0) for task in tasks),
        Column("mean, %", "mean", 1),
        Column("at the longest, %", "longest", 1),
        Column("validation, bits per byte", "validation", 3),
    )

    def reading(self, request: Request, variant: Variant, parameters: str) -> float:
        lengths, samples, depths = self._asked(request)
        questions = len(self.tasks) * len(lengths) * len(depths) * samples
        tokens = len(self.tasks) * len(depths) * samples * sum(lengths)
        return questions * QUESTION_SECONDS + FORWARD * tokens / speed(variant.system, parameters)

    def _asked(self, request: Request) -> tuple[tuple[int, ...], int, tuple[float, ...]]:
        """Lengths, texts for each task, length and depth, and depths."""
        return {
            "quick": (self.quick_lengths, 1, DEPTHS[1:4:2]),
            "medium": (self.medium_lengths, 4, DEPTHS),
            "full": (self.lengths, 8, DEPTHS),
        }[request.budget]

    def models(self, request: Request) -> Path:
        """Needles and stories are asked of the same models."""
        return request.work / "models" / "needles"

    def read(self, made: Trained, request: Request, seed: int) -> Numbers:
        lengths, samples, depths = self._asked(request)
        text = book(QUICK_HAYSTACK if request.quick else HAYSTACK)
        found: Numbers = {}
        for task in self.tasks:
            for length in lengths:
                cells = needle_table(
                    made.reader, byte_tokenizer(), task, [length], depths, haystack=text,
                    samples=samples, batch_size=min(samples, 4), piece_length=length, seed=seed,
                )  # fmt: skip
                found[f"{task} {length}"] = [sum(c.correct for c in cells), sum(c.samples for c in cells)]
        longest = {name: share for name, share in found.items() if name.endswith(f" {lengths[-1]}")}
        means = {task: mean_of(found, task) for task in self.tasks}
        return found | means | {"mean": mean_of(found, ""), "longest": mean_of(longest, "")}

    def claims(self) -> list[Claim]:
        better = {"lmm": ["ttt-linear", "mamba2", "deltanet"]}
        better |= {hybrid: ["lmm", "ttt-linear", "mamba2", "deltanet"] for hybrid in ("mac", "mag", "mal")}
        return comparisons("needles", "S-NIAH", better, "recalls more", "mean", floor=RECALLS_NOTHING)


class Stories(Needles):
    """The same models asked about people and things in stories whose sentences are spread over a book."""

    name = "paper-babi-long"
    title = "Reasoning over facts in a book: figure 6"
    heading = "The paper's figure 6 (BABILong), stories after bAbI's tasks 1 to 3, one byte a token"
    elsewhere = ("recall", "graft-comparison")
    systems = variants("mac", "mamba2", "recurrent-gemma", "transformer", "lmm", "gated-deltanet", "rwkv7")
    tasks = ("qa1", "qa2", "qa3")
    lengths, medium_lengths, quick_lengths = (2048, 8192, 32768, 131072), (2048, 16384), (2048,)
    columns = (*(Column(task, task, 0) for task in tasks), *Needles.columns[3:])

    def claims(self) -> list[Claim]:
        source = "arXiv 2501.00663, figure 6, fine-tuned"
        what = "at the longest length"
        small = [
            Claim(
                f"Titans (MAC) answers more than {name} {what}", source, "mac", than, "longest",
                floor=RECALLS_NOTHING,
            )
            for than, name in (("mamba2", "Mamba"), ("recurrent-gemma", "RecurrentGemma"))
        ]  # fmt: skip
        large = ("RMT", "Llama 3.1 8B with retrieval", "GPT-4", "Qwen2.5 72B", "Llama 3.1 70B")
        reason = "needs weights or training that cannot be had here"
        return [
            *small,
            *(Claim(f"Titans (MAC) answers more than {name}", source, unavailable=reason) for name in large),
        ]
