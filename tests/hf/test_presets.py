"""Presets: every size of every variant, counted, against the formula and the tables of the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from titans.hf import PEAK_LEARNING_RATES, PRESETS, TitansConfig, TitansForCausalLM

from ..variants import VARIANTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "parameters.md"
# The blocks that the formula of the document covers.
FORMULA = [*VARIANTS, "hope"]
NOMINAL = {"170m": 170e6, "340m": 340e6, "760m": 760e6, "1.3b": 1.3e9}
# layers, width, intermediate width, heads, peak learning rate
PAPER = {
    "170m": (12, 768, 2048, 12, 3e-3),
    "340m": (24, 1024, 2752, 16, 1.5e-3),
    "760m": (24, 1536, 4096, 24, 1.25e-3),
    "1.3b": (18, 2048, 5504, 32, 7e-4),
}


def parts(config: TitansConfig) -> dict[str, int]:
    """The closed formula of docs/reference/parameters.md, part by part, for the whole model."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, dim, width = (
        config.num_attention_heads,
        config.head_dim,
        config.num_attention_heads * config.head_dim,
    )
    depth, e = config.memory_depth, config.memory_expansion
    memory, p = config.memory, config.num_persistent_tokens
    form, conv = memory.memory_form, memory.conv_kernel
    hidden = dim * e
    mapped = memory.features != "identity"
    size = (memory.feature_size or 4 * dim) if mapped else dim
    initial = heads * (size * dim if depth == 1 else 2 * hidden * dim + (depth - 2) * hidden * hidden)
    projections = {"identity": 0, "sin": 1}.get(memory.features, 2)
    features = heads * (projections * size * dim + (memory.features == "sin"))
    norm = (2 if form.norm else 0) * width
    # The update from the text and the initial memory are normalised apart.
    reads = (2 if form.decay_to_initial else 1) * width
    has_memory = config.has_memory
    memories = 1 + len(memory.local_chunk_sizes or ())
    gates = 3 * memories * heads * depth * (d + 1 + dim * form.gates_see_keys)
    seen = d + width * form.gates_see_keys
    gates += memories * form.gate_hidden_size * (seen + 3 * heads * depth)
    # Hope's continuum has several memories; before them stand those that modify themselves.
    chain = len(memory.periods or (4, 16, 64)) if config.variant == "hope" else 1
    itself = 4 * d * width + 2 * width * conv + heads * (3 * dim + 2) * dim + 2 * heads + width
    return {
        "embedding": config.vocab_size * d * (1 if config.tie_word_embeddings else 2),
        "SwiGLU": layers * 3 * d * f,
        "attention": layers * 4 * d * width * (config.variant not in ("lmm", "hope")),
        "memory": layers
        * chain
        * ((5 + bool(memory.caching)) * d * width + 3 * width * conv + gates + features)
        * has_memory,
        "initial memory": layers * chain * (memories * (initial + norm) + reads) * has_memory,
        "self-modifying memory": layers * itself * (config.variant == "hope"),
        "recall": layers * (2 * d * width + width * conv + reads) * (config.variant == "mac"),
        "persistent tokens": layers * p * d * has_memory,
        "norms": d + layers * d * {"mag": 4, "mal": 3, "mac": 5, "hope": 2 + chain}.get(config.variant, 2),
    }


def count(config: TitansConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in TitansForCausalLM(config).parameters())


def number(text: str) -> float:
    return float(text.replace(" ", "").replace(",", "").replace("−", "-").rstrip("%"))


def table(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of the document, without its two header lines."""
    below = DOCUMENT.read_text().split(f"## {heading}\n")[1]
    lines = re.split(r"\n## ", below)[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("variant", FORMULA)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_parameters_of_the_formula(preset, variant):
    config = TitansConfig.from_preset(preset, variant=variant)
    assert count(config) == sum(parts(config).values())


@pytest.mark.parametrize("variant", ["mag", "mal", "lmm"])
def test_the_formula_holds_with_local_memories(variant):
    form = dict(norm=True, gates_see_keys=True)
    memory = dict(local_chunk_sizes=[4, 8], shard_length=64, form=form)
    config = TitansConfig.from_preset("tiny", variant=variant, memory=memory)
    assert count(config) == sum(parts(config).values())


@pytest.mark.parametrize("variant", FORMULA)
@pytest.mark.parametrize(
    "changes",
    [
        dict(memory_depth=1, memory={"form": "paper"}, tie_word_embeddings=False),
        dict(memory_depth=4, head_dim=6, num_attention_heads=5, memory={"conv_kernel": 1}),
        dict(memory_depth=3, memory_expansion=1, intermediate_size=7, num_persistent_tokens=0),
        dict(memory={"form": "recall", "start": "induction"}),
        dict(memory={"form": {"gate_hidden_size": 5}, "conv_kernel": 3}),
        dict(memory_depth=1, memory={"features": "sin", "start": "sharp"}),
        dict(memory_depth=1, memory={"features": "swiglu", "feature_size": 5}),
    ],
)
def test_the_formula_holds_for_any_sizes(variant, changes):
    config = TitansConfig.from_preset("tiny", variant=variant, **changes)
    assert count(config) == sum(parts(config).values())


def test_the_table_of_sizes_is_true():
    rows = {(variant, size): cells for size, variant, *cells in table("Sizes")}
    assert rows.keys() == {(variant, size) for variant in FORMULA for size in NOMINAL}
    for (variant, size), (exact, nominal, distance) in rows.items():
        expected = count(TitansConfig.from_preset(size, variant=variant))
        assert number(exact) == expected
        assert number(nominal) == NOMINAL[size]
        assert number(distance) == round(100 * (expected / NOMINAL[size] - 1), 1)


def test_the_table_of_parts_is_true():
    sums = {size: parts(TitansConfig.from_preset(size, variant="mac")) for size in NOMINAL}
    rows = {part: cells for part, *cells in table("Where they are")}
    assert list(rows) == list(sums["170m"])
    for part, cells in rows.items():
        assert [number(cell) for cell in cells] == [round(sums[size][part] / 1e6, 1) for size in NOMINAL]


@pytest.mark.parametrize("preset", PAPER)
def test_the_paper_sizes_are_the_papers(preset):
    config = TitansConfig.from_preset(preset)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    sizes = [getattr(config, name) for name in names]
    assert (*sizes, PEAK_LEARNING_RATES[preset]) == PAPER[preset]
    assert (config.chunk_size, config.segment_length, config.sliding_window) == (16, 512, 2048)
    assert (config.num_persistent_tokens, config.memory_depth, config.memory_expansion) == (128, 1, 4)
    assert (config.vocab_size, config.memory.conv_kernel, config.head_dim) == (32000, 4, 64)


@pytest.mark.parametrize("variant", FORMULA)
def test_tiny_is_about_a_million(variant):
    config = TitansConfig.from_preset("tiny", variant=variant)
    assert config.vocab_size == 256 and 0.5e6 <= count(config) <= 1.6e6


def test_every_preset_has_a_learning_rate():
    assert PRESETS.keys() == PEAK_LEARNING_RATES.keys()
