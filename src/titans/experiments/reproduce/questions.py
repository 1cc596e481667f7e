"""What else one would ask of a memory, each as a plot and three sentences, from results that are there."""

from __future__ import annotations

import json
import math
import statistics
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from titans.data.recall import NUM_VALUES
from titans.experiments.memory_arms import ARMS, HEADS
from titans.experiments.reproduce.claims import half_interval
from titans.train.checkpoint import write_bytes

FILE = "questions.md"
Cells = Mapping[str, Mapping[str, Any]]
# Bytes of a fast weight.
_FLOAT = 4
# Pairs of the test that no memory here holds all of.
_PAIRS = 512
_GIGABYTE = 1e9
_NOT_YET = "Not measured yet: {}.json has too little for it."
# In place of less than chance, whose logarithm is wanted.
_LEAST = 1e-3


class Question(ABC):
    """title: the question. source: name of the JSON file it is answered from. picture: of its plot."""

    title: ClassVar[str]
    source: ClassVar[str]
    picture: ClassVar[str]
    shown: ClassVar[str]

    def ready(self, cells: Cells) -> bool:
        """Whether there is enough to answer it."""
        return bool(cells)

    @abstractmethod
    def sentences(self, cells: Cells) -> list[str]:
        """Three sentences."""

    @abstractmethod
    def draw(self, cells: Cells, axes: Any) -> None:
        """The plot."""


class Capacity(Question):
    """Pairs that memories of different sizes hold."""

    title = "What would a memory of a gigabyte hold?"
    source, picture = "memory-forms", "question-capacity.png"
    shown = "Pairs recalled of 512 against bytes of fast weights, each form and seed, and the fitted powers"

    def points(self, cells: Cells) -> dict[str, dict[int, list[tuple[float, float]]]]:
        """Form → seed → (bytes of fast weights, pairs recalled beyond chance), smallest first."""
        found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for name, cell in cells.items():
            task, *rest = name.split(", ")
            if task == "pairs" and str(_PAIRS) in cell:
                size, form, seed = rest
                numbers = HEADS * ARMS[form][size].numbers
                # A guess is right once in as many values as there are.
                known = max(NUM_VALUES * cell[str(_PAIRS)] - 1, _LEAST) / (NUM_VALUES - 1)
                point = float(_FLOAT * numbers), _PAIRS * known
                found[form][int(seed.removeprefix("seed "))].append(point)
        return {form: {seed: sorted(points) for seed, points in of.items()} for form, of in found.items()}

    def powers(self, cells: Cells) -> dict[str, tuple[float, float, float, float]]:
        """Form → power of the bytes, half of its 95 % interval over seeds, largest bytes and mean pairs."""
        found = {}
        for form, seeds in self.points(cells).items():
            fits = [slope(points) for points in seeds.values() if len({size for size, _ in points}) > 1]
            half = half_interval(fits)
            if half is not None:
                largest = max(size for points in seeds.values() for size, _ in points)
                held = [pairs for points in seeds.values() for size, pairs in points if size == largest]
                found[form] = statistics.mean(fits), half, largest, statistics.mean(held)
        return found

    def sentences(self, cells: Cells) -> list[str]:
        powers = self.powers(cells)
        best = max(powers, key=lambda form: powers[form][3])
        power, half, size, pairs = powers[best]
        factor = _GIGABYTE / size
        low, middle, high = (pairs * factor**p for p in (power - half, power, power + half))
        listed = ", ".join(f"{form} {p:.2f} ± {h:.2f}" for form, (p, h, _, _) in powers.items())
        return [
            f"In one layer with {HEADS} heads, trained and tested by [memory-forms](memory-forms.md), the "
            f"pairs recalled of {_PAIRS} beyond chance grow as a power of the bytes of fast weights: "
            f"{listed} (95 % intervals over seeds).",
            f"Were that to go on, {best}, which holds {pairs:.0f} pairs in {size / 1024:.0f} KB, would hold "
            f"{middle:.1e} pairs in a gigabyte, {low:.1e} to {high:.1e} by the interval of the power alone.",
            f"The sizes measured span a factor of {self._span(cells):.0f} and the gigabyte is {factor:,.0f} "
            "times the largest of them, so this is an extrapolation that no measurement supports; momentum "
            "takes as many bytes again.",
        ]

    def _span(self, cells: Cells) -> float:
        sizes = [size for of in self.points(cells).values() for points in of.values() for size, _ in points]
        return max(sizes) / min(sizes)

    def draw(self, cells: Cells, axes: Any) -> None:
        powers = self.powers(cells)
        for number, (form, seeds) in enumerate(self.points(cells).items()):
            points = [point for of in seeds.values() for point in of]
            axes.scatter(*zip(*points, strict=True), s=14, color=f"C{number}", label=form)
            if form in powers:
                power, _, size, pairs = powers[form]
                ends = [min(p[0] for p in points), _GIGABYTE]
                line = [pairs * (end / size) ** power for end in ends]
                axes.plot(ends, line, color=f"C{number}", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="bytes of fast weights", ylabel="pairs recalled")


class Gain(Question):
    """What Titans (LMM) gains over the transformer, by their size."""

    title = "Does the gain shrink with size?"
    source, picture = "paper-language", "question-gain.png"
    shown = (
        "Bits per byte by which Titans (LMM) predicts other texts better than the transformer, by parameters"
    )

    def gains(self, cells: Cells) -> dict[int, list[tuple[float, float]]]:
        """Seed → (parameters, bits per byte gained), smallest first."""
        found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for name, cell in cells.items():
            label, size, seed = name.rsplit(", ", 2)
            if "carried" in cell:
                found[size, int(seed.removeprefix("seed "))][label] = cell
        gains: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for (_, seed), systems in found.items():
            if systems.keys() >= {"lmm", "transformer"}:
                gained = systems["transformer"]["carried"] - systems["lmm"]["carried"]
                gains[seed].append((float(systems["lmm"]["parameters"]), gained))
        return {seed: sorted(points) for seed, points in gains.items() if len(points) > 1}

    def slopes(self, cells: Cells) -> list[float]:
        """Bits per byte for ten times the parameters, of each seed."""
        return [
            statistics.linear_regression([math.log10(n) for n, _ in points], [g for _, g in points]).slope
            for points in self.gains(cells).values()
        ]

    def ready(self, cells: Cells) -> bool:
        return len(self.gains(cells)) > 1

    def sentences(self, cells: Cells) -> list[str]:
        slopes = self.slopes(cells)
        mean, half = statistics.mean(slopes), half_interval(slopes) or math.inf
        word = "shrinks" if mean + half < 0 else "grows" if mean - half > 0 else "neither shrinks nor grows"
        sizes = defaultdict(list)
        for points in self.gains(cells).values():
            for number, gained in points:
                sizes[float(f"{number:.2g}")].append(gained)
        listed = ", ".join(f"{statistics.mean(g):+.3f} at {n:,.0f}" for n, g in sorted(sizes.items()))
        return [
            f"Titans (LMM) gains over the transformer, in bits per byte of other texts "
            f"([language](paper-language.md)): {listed} parameters.",
            f"Ten times the parameters change that by {mean:+.3f} ± {half:.3f} (95 % interval over "
            f"{len(slopes)} seeds), so that the gain {word} beyond the interval.",
            "Each size read the same text, so that larger models are trained shorter for their size.",
        ]

    def draw(self, cells: Cells, axes: Any) -> None:
        for seed, points in self.gains(cells).items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"seed {seed}")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="parameters", ylabel="gain, bits per byte")


class Length(Question):
    """Recall by length, of every task that all of the models were asked."""

    title = "How far does each model recall beyond its training length?"
    source, picture = "recall", "question-length.png"
    shown = "Needles recalled by length of the text, mean of three tasks"
    tasks = ("number", "word", "passkey")

    def shares(self, cells: Cells) -> dict[str, dict[int, float]]:
        """Model → length → % of needles at all depths, where all tasks were asked."""
        asked: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for name, cell in cells.items():
            model, task, length = name.rsplit(", ", 2)
            if task in self.tasks:
                right = sum(depth[2] for depth in cell["depths"])
                asked[model][int(length)][task] = 100 * right / sum(depth[3] for depth in cell["depths"])
        return {
            model: {
                length: statistics.mean(found.values())
                for length, found in sorted(lengths.items())
                if len(found) == len(self.tasks)
            }
            for model, lengths in asked.items()
        }

    def sentences(self, cells: Cells) -> list[str]:
        shares = {model: found for model, found in self.shares(cells).items() if found}
        best = max(shares, key=lambda model: statistics.mean(shares[model].values()))
        found = ", ".join(f"{share:.0f} % after {length:,}" for length, share in shares[best].items())
        short = min(min(found) for found in shares.values())
        begins = ", ".join(
            f"{model} {found[short]:.0f} %" for model, found in shares.items() if short in found
        )
        ends = ", ".join(
            f"{model} {max(found):,} ({found[max(found)]:.0f} %)" for model, found in shares.items()
        )
        return [
            f"After {short:,} bytes the models of [recall](recall.md) recall of three kinds of needles: "
            f"{begins}.",
            f"The one that recalls furthest, {best}, has {found} bytes.",
            f"The longest text that each was asked about in all three, with what it recalled: {ends}.",
        ]

    def draw(self, cells: Cells, axes: Any) -> None:
        for model, found in self.shares(cells).items():
            axes.plot([*found], [*found.values()], marker="o", markersize=3, label=model)
        axes.set(xscale="log", xlabel="bytes of text", ylabel="recalled, %", ylim=(-3, 103))


class Twice(Question):
    """Recall after a text was read once and twice."""

    title = "Does a second reading help?"
    source, picture = "memory", "question-twice.png"
    shown = "Facts recalled after one and after two readings of the same text"

    def shares(self, cells: Cells) -> dict[str, dict[str, dict[int, tuple[int, int]]]]:
        """Model → reading → length → right and asked."""
        found: dict[str, dict[str, dict[int, tuple[int, int]]]] = {}
        for name, cell in cells.items():
            if name.endswith(", twice"):
                of = found.setdefault(name.removesuffix(", twice"), {})
                for reading, length, right, asked in cell["rows"]:
                    of.setdefault(reading, {})[length] = right, asked
        return found

    def sentences(self, cells: Cells) -> list[str]:
        shares, gains = self.shares(cells), []
        for model, of in shares.items():
            once, twice = of["read once"], of["read twice"]
            length = max(once)
            (first, asked), (second, _) = once[length], twice[length]
            gains.append((second / asked - first / asked, model, length, first, second, asked))
        listed = "; ".join(
            f"{model}: {first} of {asked} once, {second} twice" for _, model, _, first, second, asked in gains
        )
        better = sum(
            of["read twice"][n][0] > of["read once"][n][0] for of in shares.values() for n in of["read once"]
        )
        worse = sum(
            of["read twice"][n][0] < of["read once"][n][0] for of in shares.values() for n in of["read once"]
        )
        cases = sum(len(of["read once"]) for of in shares.values())
        return [
            f"In {better} of {cases} cases of [memory](memory.md) more facts are recalled after a second "
            f"reading of the same text, in {worse} fewer.",
            f"At the longest distance, {max(length for _, _, length, *_ in gains):,} bytes: {listed}.",
            "These are the models with a memory alone; of other systems no second reading has been measured.",
        ]

    def draw(self, cells: Cells, axes: Any) -> None:
        for number, (model, of) in enumerate(self.shares(cells).items()):
            for reading, style in (("read once", "--"), ("read twice", "-")):
                share = {length: 100 * right / asked for length, (right, asked) in of[reading].items()}
                label = f"{model}, {reading}"
                axes.plot([*share], [*share.values()], style, color=f"C{number}", marker="o", label=label)
        axes.set(xscale="log", xlabel="bytes of text", ylabel="recalled, %", ylim=(-3, 103))


class Retrieval(Question):
    """Facts recalled by a graft's memory, and by the passages that BM25 finds in the same text."""

    title = "A memory or BM25 with the same bytes?"
    source, picture = "graft-comparison", "question-retrieval.png"
    shown = "Facts recalled by SmolLM2 with a memory, with BM25's passages, and with full attention"
    systems = ("passages", "full attention", "titans-smollm2-135m")
    retrieval, memory = "passages", "titans-smollm2-135m"

    def shares(self, cells: Cells) -> dict[str, dict[str, tuple[int, int]]]:
        """System → kind of task and length → right and asked, over all seeds and kinds of facts."""
        found: dict[str, dict[str, tuple[int, int]]] = {system: {} for system in self.systems}
        for name, cell in cells.items():
            task, length, system = (*name.split(", "), "", "")[:3]
            if task in ("one", "four") and system in found and "right" in cell:
                right, asked = found[system].get(key := f"{task} of {length} tokens", (0, 0))
                more = [*cell["right"].values()]
                found[system][key] = right + sum(a for a, _ in more), asked + sum(b for _, b in more)
        return found

    def sentences(self, cells: Cells) -> list[str]:
        shares = self.shares(cells)
        both = [task for task in shares[self.retrieval] if task in shares[self.memory]]
        listed = "; ".join(
            f"{task}: {shares[self.memory][task][0]} of {shares[self.memory][task][1]} by the memory, "
            f"{shares[self.retrieval][task][0]} of {shares[self.retrieval][task][1]} with passages"
            for task in both
        )
        read = [cell for name, cell in cells.items() if _is_prediction(name, self.memory)]
        state = max((cell["bytes"] for cell in read), default=0)
        return [
            f"SmolLM2 recalls facts by the memory of its graft or with the passages that BM25 finds "
            f"([graft-comparison](graft-comparison.md)): {listed or 'not measured yet'}.",
            f"The memory takes {state / 1e6:.2f} MB whatever it has read; in as many bytes BM25 keeps a text "
            f"of {state / 1e6:.2f} million letters whole, so that it has forgotten nothing of any text here.",
            "A text longer than that, of which BM25 could keep a part only, is not measured.",
        ]

    def draw(self, cells: Cells, axes: Any) -> None:
        shares = self.shares(cells)
        tasks = [*dict.fromkeys(task for of in shares.values() for task in of)]
        for number, (system, of) in enumerate(shares.items()):
            places = [n + 0.27 * number for n, task in enumerate(tasks) if task in of]
            heights = [100 * of[task][0] / of[task][1] for task in tasks if task in of]
            axes.bar(places, heights, 0.25, label=system)
        axes.set_xticks([n + 0.27 for n in range(len(tasks))], tasks, fontsize=8)
        axes.set(ylabel="recalled, %", ylim=(0, 103))


def _is_prediction(name: str, system: str) -> bool:
    return name.startswith("prediction, ") and name.endswith(f", {system}")


QUESTIONS: tuple[Question, ...] = (Gain(), Length(), Retrieval(), Capacity(), Twice())


def slope(points: Iterable[tuple[float, float]]) -> float:
    """The power that fits y to x best, by least squares of logarithms."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    found: float = statistics.linear_regression(x, y).slope
    return found


def cells_of(folder: Path, source: str) -> Cells:
    """The cells of a JSON file of results; none if it is missing."""
    path = folder / f"{source}.json"
    found: Cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
    return found


def questions_page(folder: Path) -> str:
    """The page of the results in a folder."""
    sections = []
    for question in QUESTIONS:
        cells = cells_of(folder, question.source)
        ready = question.ready(cells)
        text = " ".join(question.sentences(cells)) if ready else _NOT_YET.format(question.source)
        picture = f"\n\n![{question.shown}]({question.picture})" if ready else ""
        sections.append(f"## {question.title}\n\n{text}{picture}")
    head = (
        "# Questions\n\n`titans reproduce questions --output docs/results` draws this page from the JSON "
        "files next to it; nothing is measured for it."
    )
    return "\n\n".join([head, *sections]) + "\n"


def write_questions(folder: Path) -> str:
    """Write the page and its pictures, and return the page.

    Raises:
        OSError: if a file cannot be written.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = questions_page(folder)
    for question in QUESTIONS:
        if question.ready(cells := cells_of(folder, question.source)):
            figure = Figure(figsize=(6.4, 4), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            question.draw(cells, axes)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            write_bytes(folder / question.picture, picture.getvalue())
    write_bytes(folder / FILE, page.encode())
    return page
