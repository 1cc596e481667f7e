"""What is asked of results that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans.data.recall import NUM_VALUES
from titans.experiments.memory_arms import ARMS
from titans.experiments.reproduce.questions import (
    QUESTIONS,
    Capacity,
    Cells,
    Gain,
    Length,
    Twice,
    questions_page,
    slope,
)

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_page_of_the_docs_is_of_the_results_next_to_it(tmp_path: Path) -> None:
    page = questions_page(RESULTS)
    assert page == (RESULTS / "questions.md").read_text()
    assert all((RESULTS / name).is_file() for name in ("question-length.png", "question-capacity.png"))
    assert questions_page(tmp_path).count("Not measured yet") == len(QUESTIONS)


def test_a_gain_shrinks_where_the_interval_of_its_slope_says_so() -> None:
    def cells(noise: float) -> Cells:
        found = {}
        for seed, off in enumerate((-noise, 0, noise)):
            for size, number, gain in (("250k", 250_000, 0.3 + off), ("2500k", 2_500_000, 0.2 - off)):
                found[f"lmm, {size}, seed {seed}"] = {"carried": 2.0, "parameters": number}
                found[f"transformer, {size}, seed {seed}"] = {"carried": 2.0 + gain, "parameters": number}
        return found

    assert Gain().slopes(cells(0)) == [pytest.approx(-0.1)] * 3
    said = " ".join(Gain().sentences(cells(0.01)))
    # 0.02 apart from one seed to the next: 4.30 · 0.02 / √3.
    assert "by -0.100 ± 0.050" in said and "the gain shrinks" in said and "+0.300 at 250,000" in said
    assert "neither shrinks nor grows" in " ".join(Gain().sentences(cells(0.03)))
    assert not Gain().ready({"lmm, 1M, seed 0": {"carried": 2.0, "parameters": 1}})


def test_capacity_is_extrapolated_with_the_power_of_each_seed() -> None:
    assert slope([(10, 3), (100, 30), (1000, 300)]) == pytest.approx(1)
    # Pairs grow as bytes to the power of 1/2 in every seed: the interval is nothing.
    chance = 1 / NUM_VALUES
    cells = {
        f"pairs, {size}, linear, seed {seed}": {
            "512": chance + (1 - chance) * (seed + 1) * ARMS["linear"][size].numbers ** 0.5 / 1e4
        }
        for size in ("1k", "4k")
        for seed in range(3)
    }
    (power, half, size, pairs) = Capacity().powers(cells)["linear"]
    assert (power, half) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    assert size == 2 * 4 * 64 * 64 and pairs == pytest.approx(512 * 2 * 64 / 1e4)
    expected = pairs * (1e9 / size) ** 0.5
    assert f"would hold {expected:.1e} pairs in a gigabyte" in " ".join(Capacity().sentences(cells))


def test_lengths_where_a_task_is_missing_are_left_out_and_readings_are_counted() -> None:
    one, two = {"depths": [[0.0, True, 3, 4], [0.5, True, 1, 4]]}, {"depths": [[0.0, True, 8, 8]]}
    cells = {"m, number, 512": one, "m, word, 512": two, "m, passkey, 512": two, "m, number, 2048": one}
    assert Length().shares(cells) == {"m": {512: pytest.approx(250 / 3)}}
    once, twice = [["read once", 8, 5, 10], ["read once", 9, 4, 10]], [["read twice", 8, 7, 10]]
    rows = [*once, *twice, ["read twice", 9, 1, 10]]
    said = " ".join(Twice().sentences({"m, twice": {"rows": rows}}))
    assert "In 1 of 2 cases" in said and "in 1 fewer" in said and "m: 4 of 10 once, 1 twice" in said
