"""The runner of experiments: what is kept, when, and what a second call does again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from titans.experiments import held_out
from titans.experiments.catalog import EXPERIMENTS
from titans.experiments.results import LIMIT, Results, encoded, rounded
from titans.experiments.runner import Cell, Experiment, Request, Ticker, duration, run
from titans.experiments.tables import interval, markdown, percent


class Dice(Experiment):
    """A cell for each seed: a random number. `stop` is the seed at which it is interrupted."""

    name = "dice"
    title = "Dice"

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.measured = stop, []

    def cells(self, request: Request) -> list[Cell]:
        return [Cell(f"throw, seed {seed}", seed, seed) for seed in range(request.seeds or 3)]

    def measure(self, cell: Cell, request: Request, progress) -> dict:
        if cell.settings == self.stop:
            raise KeyboardInterrupt
        self.measured.append(cell.settings)
        return {"throw": torch.rand(()).item()}

    def table(self, results: Results) -> str:
        return markdown(["cell"], [[name] for name in results.cells])


def kept(folder: Path) -> dict:
    return json.loads((folder / "dice.json").read_text())["cells"]


def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    first, again = Dice(stop=2), Dice()
    with pytest.raises(KeyboardInterrupt):
        run(first, Request(), tmp_path / "parts")
    assert first.measured == [0, 1]
    assert list(kept(tmp_path / "parts")) == ["throw, seed 0", "throw, seed 1"]
    with pytest.raises(ValueError, match="--resume"):
        run(again, Request(), tmp_path / "parts")
    page = run(again, Request(), tmp_path / "parts", resume=True)
    assert again.measured == [2]
    whole = run(Dice(), Request(), tmp_path / "whole")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    assert len({cell["throw"] for cell in kept(tmp_path / "whole").values()}) == 3
    assert page == whole == (tmp_path / "whole" / "dice.md").read_text()
    assert "| throw, seed 2 |" in page and "`python -m titans.experiments dice`" in page
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["dice.json", "dice.md"]


def test_cells_are_chosen_by_pattern_part_and_number_of_seeds(tmp_path: Path) -> None:
    for part in ((0, 2), (1, 2)):
        dice = Dice()
        run(dice, Request(seeds=5), tmp_path, resume=True, part=part)
        assert dice.measured == list(range(5))[part[0] :: 2]
    dice = Dice()
    run(dice, Request(seeds=9), tmp_path, resume=True, only=["*seed 7", "*seed 1"])
    assert dice.measured == [7]
    with pytest.raises(ValueError, match="no cell has such a name"):
        run(dice, Request(), tmp_path, resume=True, only=["roll*"])
    with pytest.raises(ValueError, match="of budget 'full'"):
        run(dice, Request("quick"), tmp_path, resume=True)


def test_results_stay_small_and_finite(tmp_path: Path) -> None:
    assert rounded({"a": [0.123456789, 12345678.9, 7, None, True]}, 4) == {
        "a": [0.1235, 12350000.0, 7, None, True]
    }
    results = Results(tmp_path / "big.json")
    with pytest.raises(ValueError, match="not a result"):
        results.add("infinite", {"x": float("inf")}, "today", "here")
    numbers = {"x": torch.rand(11_000, dtype=torch.float64).tolist()}
    results.add("many", numbers, "today", "here")
    assert len((tmp_path / "big.json").read_bytes()) <= LIMIT
    assert results.cells["many"] == rounded(numbers, 6), "rounded no more than the limit asks for"
    before = (tmp_path / "big.json").read_bytes()
    with pytest.raises(ValueError, match="record fewer numbers"):
        results.add("more", {"x": numbers["x"] * 2}, "today", "here")
    assert (tmp_path / "big.json").read_bytes() == before
    assert len(encoded({}, [[x] for x in numbers["x"]], "rows")) <= LIMIT


def test_names_that_several_cells_list_are_written_once(tmp_path: Path) -> None:
    results = Results(tmp_path / "texts.json")
    cells = {str(i): {"texts": ["King Lear", "Essays"], "given": [f"answer {i}"], "x": i} for i in range(3)}
    for name, cell in cells.items():
        results.add(name, cell, "today", "here")
    assert results.cells == Results(results.path).cells == cells
    assert results.path.read_text().count("King Lear") == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_lists_cells_and_draws_what_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is downloaded to see whether it can be.
    monkeypatch.setattr(held_out, "_there", lambda *_: True)
    experiment = EXPERIMENTS[name]
    planned = {budget: experiment.cells(Request(budget)) for budget in ("quick", "full")}
    for cells in planned.values():
        assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.name for cell in planned["quick"]} <= {cell.name for cell in planned["full"]}
    folder = Path(__file__).parents[2] / "docs" / "results"
    page = (folder / f"{name}.md").read_text()
    assert experiment.table(Results(folder / f"{name}.json")).strip() in page, "the page is not of its JSON"
    assert all(file.stat().st_size <= LIMIT for file in folder.glob("*.json"))


def test_progress_is_shown_of_slow_steps_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((0.0, 4.0, 8.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    ticker = Ticker("steps", seconds=0)
    ticker(1, 1600)
    ticker(800, 1600)
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "1/1,600 steps · 4.0 s each · 107 min left", "800/1,600 steps · 100/s · 8.0 s left",
    ]  # fmt: skip
    assert [duration(s) for s in (0.04, 70, 150, 9000)] == ["0.0 s", "70 s", "2 min", "2.5 h"]


def test_numbers_in_tables() -> None:
    assert percent(19, 20) == "95 (76–99)"
    assert interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"
    assert interval([1.0], 2) == "1.00" and interval([]) == "–"


class Weighted(Dice):
    """Its cell depends on the weights of a model."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.weights = weights

    def cells(self, request: Request) -> list[Cell]:
        return [Cell("throw", 0, conditions={"weights": self.weights}), Cell("free", 1)]


def test_a_cell_of_other_weights_is_measured_again(tmp_path: Path) -> None:
    first, same, other = Weighted("a"), Weighted("a"), Weighted("b")
    run(first, Request(), tmp_path)
    run(same, Request(), tmp_path, resume=True)
    assert first.measured == [0, 1] and same.measured == []
    page = run(other, Request(), tmp_path, resume=True, only=["free"])
    assert other.measured == [] and "throw" not in page and list(kept(tmp_path)) == ["free"]
    run(other, Request(), tmp_path, resume=True)
    assert other.measured == [0] and kept(tmp_path)["throw"]["weights"] == "b"
