"""A table of the paper as an experiment: systems trained by one recipe, figures, and verdicts on claims."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from titans.baselines.systems import SYSTEMS
from titans.experiments.reproduce.claims import Claim, Verdict, decide, figure, paper
from titans.experiments.reproduce.order import most_decided_first
from titans.experiments.reproduce.recipe import MEDIUM, QUICK, Recipe, Trained, Variant, trained
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request, named
from titans.experiments.tables import interval, markdown

SEEDS = 3
# Processor seconds until the first measurement.
START_SECONDS = 10
# Rows of the paper that nothing here stands for.
NOT_BUILT = {
    "retnet": "RetNet",
    "gla": "GLA",
    "hgrn2": "HGRN2",
    "samba": "Samba",
    "gated-deltanet-h2": "Gated DeltaNet-H2",
}


class Column(NamedTuple):
    """A column of a table of figures: its title, the number it shows, and of what precision."""

    title: str
    key: str
    digits: int = 2


class Trial(NamedTuple):
    """What a cell measures."""

    variant: Variant
    parameters: str


class Planned(NamedTuple):
    """A measurement before its seeds: its name, what it measures, and its processor seconds."""

    name: str
    settings: Any
    cost: float


class PaperTable(Experiment):
    """What one table of the paper claims, tested.

    A full run measures every system, the others those that a claim names.

    heading: which table it is. full, medium, quick: the recipes of the budgets. systems: what is compared.
    decisive: how many of them are also measured at sizes other than the first; None for all. columns: what
    the table of figures shows. counted: what its number of parameters is. elsewhere: pages of other
    experiments about the same claims, by other recipes.
    """

    unit = 1.0
    heading: ClassVar[str]
    columns: ClassVar[Sequence[Column]]
    systems: ClassVar[Sequence[Variant]]
    decisive: ClassVar[int | None] = None
    counted: ClassVar[str] = "parameters"
    elsewhere: ClassVar[Sequence[str]] = ()
    full: ClassVar[Recipe] = Recipe()
    medium: ClassVar[Recipe] = MEDIUM
    quick: ClassVar[Recipe] = QUICK

    def __init__(self, recipe: Recipe | None = None) -> None:
        """recipe: in place of that of the budget."""
        self.given = recipe

    @property
    def short(self) -> str:
        """Its name in the command."""
        return self.name.removeprefix("paper-")

    @property
    def command(self) -> str:
        return f"titans reproduce {self.short}"

    def recipe(self, request: Request) -> Recipe:
        return self.recipe_of(request.budget)

    def recipe_of(self, budget: str) -> Recipe:
        found: Recipe = self.given or getattr(self, budget)
        return found

    def cells(self, request: Request) -> list[Cell]:
        """In an order that decides claims early, all seeds of a system one after another."""
        cells = self._cells(request)
        order = most_decided_first(
            {name: some[0].cost for name, some in cells.items()}, self.decided_by(request)
        )
        return [cell for name in order for cell in cells[name]]

    def minutes(self, request: Request, only: Sequence[str] = ("*",)) -> float:
        """Processor minutes of the cells that patterns choose, by the plan, with the start."""
        cells = named([cell for some in self._cells(request).values() for cell in some], only)
        return (START_SECONDS + sum(cell.cost for cell in cells)) / 60

    def _cells(self, request: Request) -> dict[str, list[Cell]]:
        """All seeds of each measurement."""
        planned, claims = self.planned(request), self.decided_by(request)
        if request.budget != "full":
            planned = [one for one in planned if any(one.name in needed for needed in claims)]
        seeds = range(request.seeds or (1 if request.quick else SEEDS))
        conditions = {"recipe": self.recipe(request).digest}
        return {
            one.name: [
                Cell(f"{one.name}, seed {seed}", one.settings, seed, one.cost, conditions) for seed in seeds
            ]
            for one in planned
        }

    def planned(self, request: Request) -> list[Planned]:
        """What there is to measure."""
        return [
            Planned(f"{variant.label}, {size}", Trial(variant, size), self.cost(request, variant, size))
            for number, size in enumerate(self.recipe(request).parameters)
            for variant in (self.systems[: self.decisive] if number else self.systems)
        ]

    def decided_by(self, request: Request) -> list[set[str]]:
        """The measurements that each claim needs, for each size."""
        return [
            self.needed(claim, size)
            for claim in self.claims()
            if not claim.unavailable
            for size in self.recipe(request).parameters
        ]

    def needed(self, claim: Claim, size: str) -> set[str]:
        """The measurements that a claim needs."""
        return {f"{label}, {size}" for label in (claim.better, claim.than)}

    def cost(self, request: Request, variant: Variant, parameters: str) -> float:
        """Processor seconds of a cell, for the plan."""
        # A reader of its own reads with a model that is trained for another cell, and does more for a token.
        training = 0.0 if variant.reader else self.recipe(request).seconds(variant.system, parameters)
        return training + (4 if variant.reader else 1) * self.reading(request, variant, parameters)

    def reading(self, request: Request, variant: Variant, parameters: str) -> float:
        """Processor seconds of the measurement after the training, for the plan."""
        return 0.0

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        trial: Trial = cell.settings
        recipe = self.recipe(request)
        made = trained(trial.variant, trial.parameters, cell.seed, recipe, self.models(request), progress)
        if made is None:
            return {"diverged": True}
        return made.numbers | self.read(made, request, cell.seed)

    def models(self, request: Request) -> Path:
        """The folder of trained models; tables with one recipe share them."""
        return request.work / "models" / self.short

    def read(self, made: Trained, request: Request, seed: int) -> Numbers:
        """What is measured of a trained system."""
        return {}

    @abstractmethod
    def claims(self) -> list[Claim]:
        """What the paper claims here, or how it cannot be tested."""

    def verdicts(self, results: Results) -> list[Verdict]:
        """The verdict on each claim, for each size that is measured."""
        found = []
        sizes = sorted({size for _, size, _ in map(parts, results.cells)}) or [""]
        for claim in self.claims():
            for size in sizes[:1] if claim.unavailable else sizes:
                named = claim if len(sizes) == 1 else replace(claim, text=f"{claim.text}, {size}")
                values = values_of(results, claim.key, size)
                found.append(decide(named, values, results.budget == "quick"))
        return found

    def table(self, results: Results) -> str:
        return self.drawn(results, at_the_edge(results))

    def drawn(self, results: Results, warning: str) -> str:
        """The page below its title: the conditions, a warning if there is one, figures, verdicts."""
        head = ["system", self.counted, "seeds", *(column.title for column in self.columns)]
        rows = []
        for label, size in dict.fromkeys(parts(name)[:2] for name in results.cells):
            cells = [results.cells[name] for name in results.cells if parts(name)[:2] == (label, size)]
            good = [cell for cell in cells if "diverged" not in cell]
            figures = [
                interval([cell[c.key] for cell in good if c.key in cell], c.digits) for c in self.columns
            ]
            lost = len(cells) - len(good)
            count = f"{len(good)} ({lost} diverged)" if lost else f"{len(good)}"
            counted = f"{good[0]['parameters']:,}" if good and "parameters" in good[0] else size
            rows.append([title(label), counted, count, *figures])
        notes = [note for note in (of_older_recipe(results, self.recipe_of(results.budget)), warning) if note]
        shown = notes + [markdown(head, rows)] * bool(rows)
        return "\n\n".join(
            [self.about(results), *shown, "## Verdicts", verdict_table(self.verdicts(results))]
        )

    def about(self, results: Results) -> str:
        """The conditions, in sentences."""
        recipe = self.recipe_of(results.budget)
        unit = "bytes" if recipe.vocabulary is None else "tokens"
        tried = {rate for cell in results.cells.values() for rate, _ in cell.get("tried", ())}
        rates = sorted(tried or recipe.rates)
        now = f" The recipe now has {', '.join(f'{rate:g}' for rate in recipe.rates)}."
        others = "" if set(rates) <= {*recipe.rates} else now
        return (
            f"{self.heading}. Every system has the same parameters to 2 %, read the same {recipe.steps:,} × "
            f"{recipe.batch_size} × {recipe.length} {unit} of `{recipe.data}` and had a learning rate of "
            f"{', '.join(f'{rate:g}' for rate in rates)}, chosen after {recipe.search_steps:,} steps on "
            f"validation documents.{others} Mean over seeds ± half the 95 % interval (Student's t)."
        )


def parts(cell: str) -> tuple[str, str, int]:
    """Label, size and seed of a cell's name."""
    label, size, seed = cell.rsplit(", ", 2)
    return label, size, int(seed.removeprefix("seed "))


def of_older_recipe(results: Results, recipe: Recipe) -> str:
    """How many cells were measured by another recipe than the present one; empty for none."""
    if not (older := sum(cell.get("recipe") != recipe.digest for cell in results.cells.values())):
        return ""
    return (
        f"**Of an older recipe**: {older} of {len(results.cells)} cells, whose learning rates or number of "
        f"validation tokens (now {recipe.validation:,}) were others. A run of today gives other figures, and "
        "`--resume` measures these cells again."
    )


def at_the_edge(results: Results) -> str:
    """In how many cells the best learning rate was the highest or the lowest that was tried, beyond which
    there may be a better one (not where the rate above diverged); empty where no rates were compared.
    """
    searches = [
        (cell["rate"], [rate for rate, _ in cell["tried"]])
        for cell in results.cells.values()
        if cell.get("tried")
    ]
    most = max((len(rates) for _, rates in searches), default=0)
    if most < 2:
        return ""
    highest = sum(best == max(rates) and len(rates) == most for best, rates in searches)
    lowest = sum(best == min(rates) for best, rates in searches)
    counted = f"n {highest} of {len(searches)} cells the highest rate was best, in {lowest} the lowest"
    if 2 * max(highest, lowest) <= len(searches):
        return f"I{counted}."
    return (
        f"**Too few learning rates**: i{counted}. A rate beyond may be better for some systems, and "
        "the order of the systems another."
    )


def values_of(results: Results, key: str, size: str) -> dict[str, dict[int, float]]:
    """Label → seed → number, of the cells of one size that have it."""
    found: dict[str, dict[int, float]] = {}
    for name, cell in results.cells.items():
        label, of, seed = parts(name)
        if of == size and key in cell:
            found.setdefault(label, {})[seed] = cell[key]
    return found


def title(label: str) -> str:
    """A system's title, or the label itself."""
    return SYSTEMS[label].title if label in SYSTEMS else NOT_BUILT.get(label, label)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Claims, both the paper's figures and ours, the verdict, and the difference where its interval is known:
    that of a single seed may be of either sign the next time."""
    rows = []
    for v in verdicts:
        paper = "–" if v.claim.figures is None else " / ".join(f"{x:.4g}" for x in v.claim.figures)
        ours = "–" if v.ours is None else " / ".join(f"{x:.4g}" for x in v.ours)
        difference = "–" if v.half is None else f"{v.difference:+.3g} ± {v.half:.2g}"
        word = f"{v.word} ({v.reason})" if v.reason else v.word
        rows.append([v.claim.text, v.claim.source, paper, ours, difference, word])
    return markdown(["claim", "source", "the paper's", "ours", "difference", "verdict"], rows)


def comparisons(
    table: str,
    group: str,
    pairs: Mapping[str, Sequence[str]],
    what: str,
    key: str,
    *,
    column: str | None = None,
    lower: bool = False,
    floor: float | None = None,
) -> list[Claim]:
    """A claim for each pair of rows of a table: the first is better than the second.

    Args:
        what: the claim's verb, such as "predicts text better". column: of the paper's figures; None for their
            mean. floor: of `Claim`.
    """
    source = f"{paper(table)['source']}, {group}"
    return [
        Claim(
            f"{title(better)} {what} than {title(than)}",
            source,
            better,
            than,
            key,
            lower,
            (figure(table, group, better, column), figure(table, group, than, column)),
            floor=floor,
        )
        for better, others in pairs.items()
        for than in others
    ]


def unavailable(table: str, group: str, names: Sequence[str], reason: str) -> list[Claim]:
    """Rows of a table that nothing here stands for."""
    source = f"{paper(table)['source']}, {group}"
    return [Claim(f"{name}: its row", source, unavailable=reason) for name in names]


def mean_of(numbers: Mapping[str, Any], prefix: str) -> float:
    """The mean of all shares [right, asked] whose names begin so, in %."""
    shares = [right / asked for name, (right, asked) in numbers.items() if name.startswith(prefix)]
    return 100 * sum(shares) / len(shares)
