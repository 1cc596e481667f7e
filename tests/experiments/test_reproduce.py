"""`titans reproduce`: what decides a claim, whether the paper's figures support it, and tiny cells."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from titans.cli import main
from titans.data.state_tracking import STATE_TRACKING
from titans.experiments.reproduce import language
from titans.experiments.reproduce.catalog import TABLES
from titans.experiments.reproduce.claims import Claim, decide
from titans.experiments.reproduce.language import Language
from titans.experiments.reproduce.page import claims_page, results_of, write_claims
from titans.experiments.reproduce.recipe import SPEEDS, Recipe
from titans.experiments.reproduce.synthetic import Synthetic
from titans.experiments.results import Results
from titans.experiments.runner import Request, run

TINY = Recipe(
    "excerpt", ("30k",), steps=3, search_steps=1, batch_size=2, length=24, validation=96, rates=(1e-3, 3e-3)
)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("metrics", "recipe"):
        monkeypatch.setattr(f"titans.train.{module}.draw_curves", lambda lines, path: None)


def test_an_interval_over_seeds_decides_a_claim() -> None:
    claim = Claim("a is better than b", "a table", "a", "b", "loss", lower=True)

    def word(a: list[float], b: list[float], quick: bool = False) -> tuple[str, str]:
        values = {"a": dict(enumerate(a)), "b": dict(enumerate(b))}
        verdict = decide(claim, values, quick)
        return verdict.word, verdict.reason

    assert word([1.0, 1.1, 1.2], [2.0, 2.2, 2.1]) == ("reproduced", "")
    assert word([2.0, 2.2, 2.1], [1.0, 1.1, 1.2]) == ("not reproduced", "the other way round")
    assert word([1.0, 2.0, 3.0], [1.5, 1.5, 3.5])[1] == "no difference beyond the interval"
    assert word([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], quick=True) == ("not decided", "a quick run")
    assert word([1.0, 1.1], [2.0, 2.2]) == ("not decided", "2 of 3 seeds")
    assert word([1.0], []) == ("not decided", "not measured yet")
    # Pairs of a seed: 1 ± 4.30 · 0.1 / √3.
    verdict = decide(claim, {"a": {0: 2.9, 1: 5.0, 2: 8.1}, "b": {0: 2.0, 1: 4.0, 2: 7.0}}, False)
    assert verdict.difference == pytest.approx(1.0) and verdict.half == pytest.approx(0.2483, abs=1e-4)


def test_every_claim_is_what_the_figures_of_the_paper_say_and_every_system_is_known() -> None:
    for name, table in TABLES.items():
        claims, labels = table.claims(), {variant.label for variant in table.systems}
        assert claims, name
        for claim in claims:
            if claim.unavailable:
                continue
            assert {claim.better, claim.than} <= labels, (name, claim)
            if claim.figures is not None:
                better, than = claim.figures
                assert (better < than) if claim.lower else (better > than), (name, claim)
        assert {variant.system for variant in table.systems} <= SPEEDS.keys()


def test_a_table_is_measured_resumed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "OTHER_TEXTS", {"the play": "excerpt"})
    table, request = Language(TINY), Request("quick", work=tmp_path / "work")
    chosen = ["lstm, *", "transformer, *", "transformer with a continuous cache, *"]
    run(table, request, tmp_path, only=chosen[:2])
    page = run(table, request, tmp_path, only=chosen, resume=True)
    cells = json.loads((tmp_path / "paper-language.json").read_text())["cells"]
    assert [*cells] == [f"{label}, 30k, seed 0" for label in ("transformer", "lstm", chosen[2][:-3])]
    for cell in cells.values():
        assert cell["rate"] in TINY.rates and len(cell["tried"]) == 2 and cell["tokens"] == 3 * 48
        assert abs(cell["parameters"] / 30_000 - 1) <= 0.02 and 4 < cell["carried"] < 10
    # They share a training.
    assert (
        cells["transformer, 30k, seed 0"]["validation"]
        == cells[f"{chosen[2][:-3]}, 30k, seed 0"]["validation"]
    )
    assert [path.name for path in sorted((tmp_path / "work/models/language").iterdir())] == [
        "lstm-30k-seed-0", "transformer-30k-seed-0",
    ]  # fmt: skip
    assert "titans reproduce language --budget quick" in page and "20.04 / 21.18" in page
    assert page.count("not testable here") == 5 and "not decided (not measured yet)" in page

    drawn = write_claims(tmp_path)
    assert "Budget quick, 1 seed" in drawn and "Not measured yet" in drawn
    assert drawn == (tmp_path / "claims.md").read_text() and "reproduced," not in drawn
    assert sum(len(table.claims()) for table in TABLES.values()) == drawn.count(
        "not decided ("
    ) + drawn.count("not testable here (")


def test_the_pages_of_the_docs_are_of_their_json() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results"
    assert (folder / "claims.md").read_text() == claims_page(folder)
    for table in TABLES.values():
        if (path := folder / f"{table.name}.json").exists():
            assert table.table(results_of(path)).strip() in path.with_suffix(".md").read_text()


def test_a_synthetic_cell_learns_its_task(tmp_path: Path) -> None:
    recipe = Recipe("", ("30k",), steps=4, search_steps=2, batch_size=4, length=64, rates=(1e-3, 1e-2))
    table, request = Synthetic(recipe), Request("quick", work=tmp_path)
    (cell,) = [c for c in table.cells(request) if c.name == "parity; transformer, 30k, seed 0"]
    found = table.measure(cell, request, lambda done, total: None)
    assert found["rate"] in recipe.rates and 30 < found["parity"] < 101 and 30 < found["parity longer"] < 101
    results = Results(tmp_path / "none.json", "quick")
    results.cells[cell.name] = found
    assert "| Transformer |" in table.table(results)


def test_states_are_tracked_as_defined() -> None:
    ids, labels = STATE_TRACKING["parity"].make(np.random.default_rng(0), 3)
    assert (labels[:, 5] == ids[:, :6].sum(1) % 2).all()
    elements = [*itertools.permutations(range(5))]
    ids, labels = STATE_TRACKING["permutations of five"].make(np.random.default_rng(0), 2)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        state = tuple(range(5))
        for element, label in zip(row, wanted, strict=True):
            state = tuple(elements[element][i] for i in state)
            assert elements[label] == state


def test_the_command_plans_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "depth", "--plan", "--seeds", "2", "--output", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert (
        err.startswith("plan: cells × processor seconds")
        and "depth 4, 100k" in err
        and "processor minutes" in err
    )
    assert main(["reproduce", "needles", "--seeds", "0"]) == 2
    assert "seeds=0" in capsys.readouterr().err
    assert main(["reproduce", "commonsense", "--output", str(tmp_path)]) == 0
    assert "titans.evaluate.lm_eval" in capsys.readouterr().out
    assert main(["reproduce", "claims", "--output", str(tmp_path)]) == 0
    assert "# What the paper claims, tested" in capsys.readouterr().out
