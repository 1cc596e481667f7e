"""Table 3: forecasts of numeric series, by the protocol of the ETT data on series that packages hold."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titans.baselines.forecasting import DLinear, SeasonalNaive
from titans.baselines.systems import system_config
from titans.data.series import load_series, standardised, windows
from titans.experiments.reproduce.claims import Claim, paper
from titans.experiments.reproduce.recipe import Recipe, Variant, variants
from titans.experiments.reproduce.table import Column, title
from titans.experiments.reproduce.tasks import Descent, Learned, TaskTable
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Request
from titans.hf import TitansConfig
from titans.hf.forecasting import TitansForecaster, TitansForecasterConfig

# Steps that are read, and of a patch; a chunk of the memory is a few patches.
HISTORY, PATCH, CHUNK = 96, 4, 4
COLUMNS = {"beijing": 7, "appliances": 26, "household": 7}
HORIZONS = (96, 336)
TRAIN, VALIDATED = 0.6, 0.8
# Windows of a forward pass, and of validation.
ROWS, VALIDATION = 64, 128
NAIVE, PERSISTENCE = "seasonal naive", "persistence"
# Fields that a forecaster has in another way than the system it is sized as.
_OWN = ("vocab_size", "layer_types")


class SeriesTable(TaskTable):
    """A cell for each series and horizon, system and seed."""

    name = "paper-series"
    title = "Forecasting: table 3"
    heading = "The paper's table 3 on other data"
    systems = (
        *variants("lmm"),
        Variant("DLinear", "DLinear"),
        Variant(NAIVE, NAIVE),
        *variants("window", "mac", "lmm-linear"),
        Variant(PERSISTENCE, PERSISTENCE),
    )
    untrained = (NAIVE, PERSISTENCE)
    # A linear map wants small steps: of 0.003 and more the smallest was best on every series.
    factors = {"DLinear": 0.1}
    tasks = tuple(f"{name} {horizon}" for name in COLUMNS for horizon in HORIZONS)
    full = Recipe("", ("100k",), steps=1500, search_steps=200, batch_size=16, length=HISTORY)
    medium = Recipe("", ("100k",), steps=400, search_steps=60, batch_size=16, length=HISTORY)
    quick = Recipe("", ("100k",), steps=20, search_steps=5, batch_size=16, length=HISTORY)
    columns = tuple(Column(task, task, 3) for task in tasks)

    def tokens(self, request: Request, task: str) -> float:
        recipe, columns = self.recipe(request), COLUMNS[task.split()[0]]
        whole = recipe.tokens + HISTORY * (4 * VALIDATION + self._tests(request)) / 3
        # Rows of a few tokens take twice the time of those of the table of speeds.
        return 2 * whole * columns / PATCH

    def _tests(self, request: Request) -> int:
        """Windows of the test, spread over its stretch."""
        return {"quick": 64, "medium": 512, "full": 2048}[request.budget]

    def learn(
        self, learned: Learned, recipe: Recipe, rate: float, steps: int, seed: int
    ) -> tuple[Any, float | None]:
        name, horizon = parts_of(learned.task)
        torch.manual_seed(seed)
        model = forecaster(learned, horizon)
        past, future = stretches(name, horizon, "train")
        if learned.trial.variant.label not in self.untrained:
            generator, descent = np.random.default_rng([seed, 0]), Descent(model.train(), rate, steps)
            for _ in range(steps):
                some = generator.integers(len(past), size=recipe.batch_size)
                loss = (forecast(model, past[some]) - tensor(future[some])).square().mean()
                if not descent.step(loss):
                    return model, None
        return model.eval(), -errors(model, *stretches(name, horizon, "validation"), VALIDATION)[0]

    def test(self, learned: Learned, request: Request, model: Any, score: float, seed: int) -> Numbers:
        name, horizon = parts_of(learned.task)
        squared, absolute = errors(model, *stretches(name, horizon, "test"), self._tests(request))
        return {learned.task: squared, f"{learned.task} MAE": absolute}

    def about(self, results: Results) -> str:
        recipe = self.recipe_of(results.budget)
        return (
            f"{self.heading}: air in Beijing, energy of a house, power of a household (UCI), since ETT and "
            "the others are in no package. Mean squared error of standardised values: "
            f"{HISTORY} steps are read and the next {' or '.join(map(str, HORIZONS))} forecast; 60 % of a "
            "series are for training, 20 % for validation, 20 % for the test. Models read each column by "
            f"itself, in patches of {PATCH} steps, and were trained on {recipe.steps:,} × "
            f"{recipe.batch_size} windows at a learning rate of "
            f"{', '.join(f'{rate:g}' for rate in recipe.rates)}, chosen after {recipe.search_steps:,} steps. "
            "Rates of DLinear are a tenth of these. Sliding window: attention over the patches. Seasonal "
            "naive: the same as a day before, or as the last step where a day is longer than what is read."
        )

    def claims(self) -> list[Claim]:
        source = "arXiv 2501.00663, table 3, on other data"
        here = [
            Claim(
                f"{title('lmm')} forecasts {task.replace(' ', ', ')} steps, better than {title(than)}",
                source, "lmm", than, task, lower=True,
            )
            for task in self.tasks
            for than in ("DLinear", NAIVE, "window")
        ]  # fmt: skip
        reason = "its data are in no package; titans.data.load_series reads them from a CSV file"
        return here + [
            Claim(
                f"{title('lmm')} forecasts {name} better than {than}", paper("series")["source"], lower=True,
                figures=(rows["lmm"][0], rows[than][0]), unavailable=reason,
            )
            for name, rows in paper("series")["rows"].items()
            for than in ("DLinear", "PatchTST")
        ]  # fmt: skip


def parts_of(task: str) -> tuple[str, int]:
    """The series of a task, and its horizon."""
    name, horizon = task.split()
    return name, int(horizon)


@cache
def _values(name: str) -> tuple[np.ndarray, int]:
    series = load_series(name)
    return standardised(series, TRAIN), series.period


def stretches(name: str, horizon: int, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a part of a series; those of validation and test begin in the part before."""
    values = _values(name)[0]
    first, second = int(TRAIN * len(values)), int(VALIDATED * len(values))
    begin, end = {
        "train": (0, first),
        "validation": (first - HISTORY, second),
        "test": (second - HISTORY, len(values)),
    }[part]
    return windows(values[begin:end], HISTORY, horizon)


def forecaster(learned: Learned, horizon: int) -> nn.Module:
    """An untrained model."""
    label = learned.trial.variant.label
    if label == "DLinear":
        return DLinear(HISTORY, horizon)
    if label in (NAIVE, PERSISTENCE):
        period = _values(parts_of(learned.task)[0])[1] if label == NAIVE else 1
        # Of a day longer than the history nothing can be repeated.
        return SeasonalNaive(horizon, period if period <= HISTORY else 1)
    sizes = system_config(learned.system, learned.trial.parameters, changes={"chunk_size": CHUNK})
    fields = {name: getattr(sizes, name) for name in TitansConfig.__annotations__ if name not in _OWN}
    return TitansForecaster(TitansForecasterConfig(**fields, patch_length=PATCH, horizon=horizon))


def forecast(model: nn.Module, past: np.ndarray) -> Tensor:
    """(batch, horizon, columns) after past (batch, history, columns)."""
    found: Any = model(tensor(past))
    return found.forecast if isinstance(model, TitansForecaster) else found


def tensor(some: np.ndarray) -> Tensor:
    """A copy, which windows that overlap are not."""
    return torch.from_numpy(np.array(some, np.float32))


@torch.no_grad()
def errors(model: nn.Module, past: np.ndarray, future: np.ndarray, count: int) -> tuple[float, float]:
    """Mean squared and mean absolute error over so many windows, spread evenly."""
    chosen = np.unique(np.linspace(0, len(past) - 1, count).round().astype(int))
    squared = absolute = 0.0
    for begin in range(0, len(chosen), ROWS):
        some = chosen[begin : begin + ROWS]
        off = forecast(model, past[some]) - tensor(future[some])
        squared += float(off.square().mean()) * len(some)
        absolute += float(off.abs().mean()) * len(some)
    return squared / len(chosen), absolute / len(chosen)
