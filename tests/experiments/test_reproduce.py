"""`titans reproduce`: what decides a claim, whether the paper's figures support it, and tiny cells."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from titans.baselines.systems import SYSTEMS
from titans.cli import main
from titans.data import load_corpus
from titans.data.sequences import LabelledSequence
from titans.data.state_tracking import STATE_TRACKING
from titans.experiments.reproduce import dna, language, needles, series
from titans.experiments.reproduce.catalog import TABLES
from titans.experiments.reproduce.claims import Claim, decide
from titans.experiments.reproduce.language import Language
from titans.experiments.reproduce.order import decided_after, most_decided_first
from titans.experiments.reproduce.page import claims_page, results_of, write_claims
from titans.experiments.reproduce.recipe import SPEEDS, Recipe
from titans.experiments.reproduce.synthetic import Synthetic
from titans.experiments.reproduce.table import at_the_edge, of_older_recipe, title, verdict_table
from titans.experiments.reproduce.tasks import TaskTable
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Budget, Cell, Request, run

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
    assert word([1.0, 2.0, 3.0], [1.5, 1.5, 3.5]) == ("not decided", "no difference beyond the interval")
    assert word([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], quick=True) == ("not decided", "a quick run")
    assert word([1.0, 1.1], [2.0, 2.2]) == ("not decided", "2 of 3 seeds")
    assert word([1.0], []) == ("not decided", "not measured yet")
    recall = Claim("a recalls more than b", "a table", "a", "b", "%", floor=2.0)
    nothing = decide(recall, {"a": dict(enumerate([1.0, 1.1, 1.2])), "b": {0: 0.0, 1: 0.0, 2: 0.0}}, False)
    assert (nothing.word, nothing.reason) == ("not decided", "neither exceeds 2")
    # Pairs of a seed: 1 ± 4.30 · 0.1 / √3.
    verdict = decide(claim, {"a": {0: 2.9, 1: 5.0, 2: 8.1}, "b": {0: 2.0, 1: 4.0, 2: 7.0}}, False)
    assert verdict.difference == pytest.approx(1.0) and verdict.half == pytest.approx(0.2483, abs=1e-4)


def test_a_difference_without_an_interval_is_not_shown() -> None:
    claim = Claim("a is better than b", "a table", "a", "b", "loss")
    once, twice = (
        {"a": dict(enumerate(a)), "b": dict(enumerate([1.0] * len(a)))} for a in ([1.25], [2, 3.0])
    )
    assert "| 1.25 / 1 | – | not decided (a quick run) |" in verdict_table([decide(claim, once, True)])
    assert "| 2.5 / 1 | +1.5 ± 6.4 | not decided (a quick run) |" in verdict_table(
        [decide(claim, twice, True)]
    )


def test_a_page_warns_of_learning_rates_at_the_edge_of_those_tried(tmp_path: Path) -> None:
    def found(*best: float) -> str:
        results = Results(tmp_path / "none.json")
        for seed, rate in enumerate(best):
            # A third rate, above these, diverged in the last.
            tried = [[0.01, 2.0], [0.03, 2.0], [0.1, 2.0]][: 2 + (seed < len(best) - 1)]
            results.cells[f"lmm, 1M, seed {seed}"] = {"rate": rate, "tried": tried}
        return at_the_edge(results)

    assert found(0.1, 0.1, 0.1, 0.03) == (
        "**Too few learning rates**: in 3 of 4 cells the highest rate was best, in 0 the lowest. A rate "
        "beyond may be better for some systems, and the order of the systems another."
    )
    assert found(0.1, 0.03, 0.01, 0.03) == "In 1 of 4 cells the highest rate was best, in 1 the lowest."
    assert at_the_edge(Results(tmp_path / "none.json")) == ""


def test_a_page_says_which_cells_are_of_an_older_recipe(tmp_path: Path) -> None:
    results = Results(tmp_path / "some.json")
    results.cells["lmm, 30k, seed 0"] = {"recipe": TINY.digest}
    assert of_older_recipe(results, TINY) == ""
    # The first cells had no recipe.
    results.cells |= {"lmm, 30k, seed 1": {"recipe": "0"}, "lmm, 30k, seed 2": {}}
    assert "2 of 3 cells" in of_older_recipe(results, TINY)


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
        assert {variant.system for variant in table.systems} & SYSTEMS.keys() <= SPEEDS.keys()


def test_the_first_measurements_decide_the_most_claims() -> None:
    costs = {"idle": 1.0, "a": 1.0, "b": 1.0, "c": 10.0, "d": 4.0}
    claims = [{"a", "c"}, {"a", "b"}, {"b", "d"}, {"a", "d"}, {"a", "missing"}]
    order = most_decided_first(costs, claims)
    assert order == ["a", "b", "d", "c", "idle"]
    assert decided_after(order, claims) == [0, 1, 3, 4, 4]


@pytest.mark.parametrize("budget", ["quick", "medium", "full"])
def test_every_budget_measures_what_every_claim_needs(budget: Budget) -> None:
    minutes = 0.0
    for name, table in TABLES.items():
        request = Request(budget)
        cells = table.cells(request)
        names = {cell.name for cell in cells}
        first = table.recipe(request).parameters[0]
        for needed in table.decided_by(request):
            if all(one.endswith(f", {first}") for one in needed):
                assert {f"{one}, seed 0" for one in needed} <= names, (name, needed)
        minutes += sum(cell.cost for cell in cells) / 60
        if budget != "full":
            measured = {cell.name.rpartition(", seed")[0] for cell in cells}
            assert measured == set().union(*table.decided_by(request)), name
    # The estimate of all quick tables, for two cores in 40 minutes.
    assert budget != "quick" or minutes < 80


def test_the_plan_of_a_small_mamba_2_is_near_what_was_measured() -> None:
    (cell,) = (c for c in TABLES["babi-long"].cells(Request("quick")) if c.name.startswith("mamba2"))
    # Of docs/notebook/2026-11-30-systems.md, processor seconds.
    assert abs(cell.cost / 56.6 - 1) < 0.25


def test_needles_are_asked_of_a_trained_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play = load_corpus("excerpt")[0].data.decode()
    monkeypatch.setattr(needles, "book", lambda length: play)
    table = needles.Needles(TINY)
    (lstm,) = [one for one in table.planned(Request("full")) if one.name == "lstm, 30k"]
    cell = Cell("lstm, 30k, seed 0", lstm.settings)
    found = table.measure(cell, Request("quick", work=tmp_path), lambda done, total: None)
    # Three tasks, two depths, one text each.
    assert [found[f"{task} 512"][1] for task in table.tasks] == [2, 2, 2]
    assert found["mean"] == found["longest"] and 0 <= found["mean"] <= 100


def test_a_table_is_measured_resumed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "OTHER_TEXTS", {"the play": "excerpt"})
    monkeypatch.setattr(Language, "_texts", lambda self, request: (1, 2048))
    table, request = Language(TINY), Request("full", seeds=1, work=tmp_path / "work")
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
    assert "`titans reproduce language`" in page and "20.04 / 21.18" in page
    assert "of 0.001, 0.003, chosen" in page and " of 3 cells the highest rate was best" in page
    assert page.count("not testable here") == 5 and "not decided (not measured yet)" in page

    drawn = write_claims(tmp_path)
    assert "Budget full, 1 seed" in drawn and "Not measured yet" in drawn
    assert drawn.count("Nothing testable here;") == 1 and "| Samba: average accuracy" in drawn
    assert "where neither exceeds 55 % (parity longer) and 2 % (permutations of five longer)." in drawn
    row = f"| `depth` | 6 | 6 | 0 | {TABLES['depth'].minutes(Request('medium')) / 60:.1f} |"
    assert row in drawn and "| `commonsense` | 13 | 0 | 0 | 0.0 | 0.0 |" in drawn
    (tmp_path / "paper-language.md").unlink()
    assert write_claims(tmp_path) == drawn and (tmp_path / "paper-language.md").exists()
    assert drawn == (tmp_path / "claims.md").read_text()
    assert sum(len(table.claims()) for table in TABLES.values()) == drawn.count(
        "not decided ("
    ) + drawn.count("not testable here (")


def test_a_vocabulary_is_trained_once_and_read_by_what_was_trained_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "OTHER_TEXTS", {"the play": "excerpt"})
    monkeypatch.setattr(language, "HYBRIDS", ())
    table = language.LanguageOfWords(replace(TINY, rates=(1e-3,), vocabulary=300))
    request = Request("quick", work=tmp_path)
    (one,) = [one for one in table.planned(request) if one.name == "lstm, 30k"]
    cell = Cell("lstm, 30k, seed 0", one.settings)
    found = table.measure(cell, request, lambda done, total: None)
    (kept,) = (tmp_path / "models/language-bpe").glob("bpe-300-*")
    before = (kept / "tokenizer.json").stat().st_mtime_ns
    assert table.measure(cell, request, lambda done, total: None) == found
    assert (kept / "tokenizer.json").stat().st_mtime_ns == before and 4 < found["carried"] < 10
    assert "tokens of `excerpt`" in table.table(Results(tmp_path / "none.json", "quick"))


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


def test_series_and_sequences_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("", ("30k",), steps=3, search_steps=1, batch_size=2, length=32, rates=(1e-3, 1e-2))
    request = Request("quick", work=tmp_path)
    day = np.sin(np.arange(900) / 24 * 2 * np.pi).astype(np.float32)[:, None]
    monkeypatch.setattr(series, "_values", lambda name: (day, 24))
    monkeypatch.setattr(series.SeriesTable, "_tests", lambda self, request: 4)
    generator = np.random.default_rng(0)
    transcripts = [
        LabelledSequence(generator.integers(1, 5, 30 + n).astype(np.uint8), n % 2, n % 4 == 3)
        for n in range(24)
    ]
    monkeypatch.setattr(dna, "sequences", lambda: transcripts)

    def measured(table: TaskTable, label: str) -> Numbers:
        (cell,) = [c for c in table.cells(request) if c.name == f"{table.tasks[0]}; {label}, 30k, seed 0"]
        return table.measure(cell, request, lambda done, total: None)

    # A day is repeated exactly.
    assert measured(series.SeriesTable(recipe), series.NAIVE)["beijing 96"] < 1e-9
    for table, label in (
        (series.SeriesTable(recipe), "window"),
        (series.SeriesTable(recipe), "DLinear"),
        (dna.Dna(recipe), "window"),
        (dna.Dna(recipe), dna.CNN),
        (dna.Dna(recipe), dna.KMERS),
    ):
        found = measured(table, label)
        assert 0 <= found[table.tasks[0]] <= 100 and found["parameters"] > 0, (table.name, label)
        results = Results(tmp_path / "none.json", "quick")
        results.cells[f"{table.tasks[0]}; {label}, 30k, seed 0"] = found
        assert f"| {title(label)} |" in table.table(results)


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
        err.startswith("plan: measurements in order")
        and "depth 4, 100k" in err
        and "6 of 6 claims measured" in err
        and err.endswith("measured is not decided: a quick run decides no claim\n")
        and "processor minutes" in err
    )
    only = ["--only", "depth 1, *", "depth 2, *"]
    assert main(["reproduce", "depth", "--plan", *only, "--output", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "depth 2, 100k" in err and "depth 3" not in err and "2 of 6 claims" in err
    minutes = TABLES["depth"].minutes(Request("quick"), only[1:])
    assert f"in all {minutes:,.0f} processor minutes" in err
    assert main(["reproduce", "depth", "--plan", "--only", "depth 9, *"]) == 1
    assert "--only depth 9, *: no cell has such a name; the first is 'depth" in capsys.readouterr().err
    assert main(["reproduce", "needles", "--seeds", "0"]) == 2
    assert "seeds=0" in capsys.readouterr().err
    assert main(["reproduce", "commonsense", "--output", str(tmp_path)]) == 0
    assert "titans.evaluate.lm_eval" in capsys.readouterr().out
    assert main(["reproduce", "claims", "--output", str(tmp_path / "empty")]) == 2
    assert "does not exist: measure a table first" in capsys.readouterr().err
    assert main(["reproduce", "claims", "--output", str(tmp_path)]) == 0
    assert "# What the paper claims, tested" in capsys.readouterr().out
