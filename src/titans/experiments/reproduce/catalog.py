"""The tables of the paper by name."""

from __future__ import annotations

from titans.experiments.reproduce.ablation import Ablation, Depth
from titans.experiments.reproduce.commonsense import Commonsense
from titans.experiments.reproduce.dna import Dna
from titans.experiments.reproduce.language import Language, LanguageOfWords
from titans.experiments.reproduce.needles import Needles, Stories
from titans.experiments.reproduce.series import SeriesTable
from titans.experiments.reproduce.synthetic import Synthetic
from titans.experiments.reproduce.table import PaperTable
from titans.experiments.reproduce.throughput import Throughput

TABLES: dict[str, PaperTable] = {
    table.short: table
    for table in (
        Language(),
        LanguageOfWords(),
        Needles(),
        Ablation(),
        Depth(),
        Throughput(),
        Synthetic(),
        Stories(),
        SeriesTable(),
        Dna(),
        Commonsense(),
    )
}
