"""Figure 9: how fast is each system in training, by the length of its rows?"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from titans.baselines.systems import SYSTEMS, system_config
from titans.experiments.reproduce.claims import Claim
from titans.experiments.reproduce.recipe import CELL_SECONDS, Recipe, Variant, speed, variants
from titans.experiments.reproduce.table import Column, PaperTable, Trial
from titans.experiments.results import Numbers
from titans.experiments.runner import Cell, Progress, Request

LENGTHS, QUICK_LENGTHS = (256, 1024, 4096, 16384), (128, 512)
SHORTEST, LONGEST, KEPT = "shortest", "longest", "kept"


class Throughput(PaperTable):
    """A cell for each system and seed: forward and backward passes over as many tokens at every length."""

    name = "paper-throughput"
    title = "Speed of training by length: figure 9"
    heading = "The paper's figure 9"
    systems = variants(
        "lmm", "transformer", "mal", "mag", "mac", "gated-deltanet", "mamba2", "window", "lmm-linear",
        "ttt-linear", "ttt-mlp", "deltanet", "lstm", "rwkv7", "recurrent-gemma",
    )  # fmt: skip
    full = medium = Recipe()
    quick = Recipe(parameters=("100k",))
    columns = (
        Column("tokens a second, shortest rows", SHORTEST, 0),
        Column("longest rows", LONGEST, 0),
        Column("longest over shortest", KEPT, 2),
    )

    def cost(self, request: Request, variant: Variant, parameters: str) -> float:
        tokens = sum(max(2 * length, 2048) for length in self._lengths(request))
        return CELL_SECONDS + 2 * tokens / speed(variant.system, parameters)

    def _lengths(self, request: Request) -> tuple[int, ...]:
        return QUICK_LENGTHS if request.quick else LENGTHS

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        trial: Trial = cell.settings
        system = SYSTEMS[trial.variant.system]
        model = system.build(system_config(trial.variant.system, trial.parameters)).train()
        speeds = []
        for length in self._lengths(request):
            # At least two rows' worth of tokens, the first time to warm up.
            ids = torch.randint(256, (max(2048 // length, 1), length))
            for _ in range(2):
                began = time.process_time()
                logits = model(input_ids=ids, use_cache=False).logits
                F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
                model.zero_grad()
                seconds = time.process_time() - began
            speeds.append(ids.numel() / seconds)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "speeds": [[n, v] for n, v in zip(self._lengths(request), speeds, strict=True)],
            SHORTEST: speeds[0],
            LONGEST: speeds[-1],
            KEPT: speeds[-1] / speeds[0],
        }

    def about(self, results: object) -> str:
        return (
            f"{self.heading}. Tokens a second of one processor's time in forward and backward passes over "
            "random bytes. Systems of transformers run its reference operations here, so that the speeds of "
            "two systems cannot be compared, and what becomes of a system's speed with the length can."
        )

    def claims(self) -> list[Claim]:
        source = "arXiv 2501.00663, figure 9"
        reason = "compares kernels for accelerators; here most systems run reference code"
        flat = "keeps more of its speed in long rows than the transformer"
        return [
            Claim(f"{SYSTEMS[name].title} {flat}", source, name, "transformer", KEPT)
            for name in ("lmm", "mal", "gated-deltanet", "mamba2")
        ] + [
            Claim(text, source, unavailable=reason)
            for text in (
                "Titans (LMM) trains slightly slower than Mamba-2 and Gated DeltaNet",
                "Titans (MAL) trains faster than all baselines",
            )
        ]
