"""The comparison of memories: as much state, as many operations, as many parameters, and nothing diverges."""

from __future__ import annotations

import pytest
import torch

from titans.experiments import memory_tasks
from titans.experiments.memory_arms import ARMS, HEADS
from titans.experiments.memory_forms import Measured, MemoryForms
from titans.experiments.results import Results
from titans.experiments.runner import Cell, Request
from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory


def silent(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("form", ARMS)
def test_arms_of_one_size_have_as_many_fast_weights_or_operations(form: str) -> None:
    assert ARMS[form]["4k"].numbers == 4096 and ARMS[form]["1k"].numbers == 1024
    budget = ARMS["sin features"]["4k"].operations
    assert ARMS[form]["equal operations"].operations == pytest.approx(budget, rel=0.03)
    for arm in ARMS[form].values():
        model = TitansForCausalLM(TitansConfig(**memory_tasks.SIZES, vocab_size=8, **arm.config("sharp")))
        (memory,) = (m for m in model.modules() if isinstance(m, NeuralMemory))
        held = sum(weight.numel() for weight in memory.empty_memory(1).weights)
        assert held == HEADS * arm.numbers, "the layer holds another number of weights than the table says"


def test_inexact_queries_are_what_narrow_features_pay_with() -> None:
    found = {}
    for form in ("linear", "sin features"):
        torch.manual_seed(0)
        found[form] = memory_tasks.robustness(ARMS[form]["4k"], 0, quick=False)
    exact = {form: shares["128 at 1.0"] for form, shares in found.items()}
    inexact = {form: shares["128 at 0.8"] for form, shares in found.items()}
    assert min(exact.values()) > 0.8
    assert inexact["linear"] > 0.6 and inexact["sin features"] < 0.4


@pytest.mark.parametrize("task, way", [("pairs", ""), ("text", "sharp"), ("mad", "compression")])
def test_quick_cells_are_measured(task: str, way: str, tmp_path) -> None:
    request, sizes = Request("quick", work=tmp_path), []
    for form in ("linear", "sin features"):
        cell = Cell(form, Measured(task, way, "4k", form))
        numbers = MemoryForms().measure(cell, request, silent)
        assert all(value >= 0 for value in numbers.values())
        sizes.append(numbers["parameters"])
    if task == "text":
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02), "not at equal parameters"


def test_a_run_that_diverges_and_one_with_few_numbers_are_results(monkeypatch, tmp_path) -> None:
    def fails(*_) -> None:
        raise RuntimeError("The total norm of order 2.0 for gradients is non-finite")

    monkeypatch.setattr(memory_tasks, "pairs", fails)
    measured = Measured("pairs", "", "4k", "deep")
    numbers = MemoryForms().measure(Cell("deep", measured), Request(work=tmp_path), silent)
    results = Results(tmp_path / "some.json")
    results.add(f"{measured.name}, seed 0", numbers, "today", "here")
    results.add("recall, 4k, linear, seed 0", {"number 512": [3, 5]}, "today", "here")
    assert "| linear | 22,528 | 1 | 60 | – | – |" in MemoryForms().table(results)
    assert "| deep | 4k | 4,096 | 25,600 | 0 (1 diverged) | – |" in MemoryForms().table(results)
