"""What the cells of the comparison say, sorted by document, task and system."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from titans.experiments.graft_comparison_systems import BASELINES, REFERENCE
from titans.experiments.graft_comparison_texts import HAYSTACKS, SAMPLES
from titans.experiments.results import Numbers

# Positions between which losses are averaged.
RANGES = ((0, 512), (512, 2048), (2048, 8192), (8192, 16384), (16384, 65536))
Cells = Mapping[str, Numbers]
Counts = dict[tuple[str, str, int, str], list[int]]


@dataclass(frozen=True)
class Prediction:
    """nats, bits: per token and per byte, by range of `RANGES`. changes: of the loss in %, against the window
    in the same precision. seconds: for 1,000 tokens. bytes: held at the end."""

    nats: list[float]
    bits: list[float]
    changes: list[float]
    seconds: float
    bytes: float
    dtype: str
    diverged: bool


@dataclass(frozen=True)
class Row:
    """Systems compared on one thing, higher values are better. weight: of a difference, for sorting."""

    label: str
    values: dict[str, float]
    unit: str
    weight: float = 1.0

    def show(self, value: float) -> str:
        return f"{-value:+.2f} %" if self.unit == "change" else f"{value:.0f} {self.unit}"


def names_in_order(found: Iterable[str]) -> list[str]:
    """Systems in the order of the baselines, then trained grafts."""
    names = {*found}
    return [name for name in BASELINES if name in names] + sorted(names - {*BASELINES})


def predictions(cells: Cells, document: str) -> dict[str, Prediction]:
    """Of each system, the cell that reads furthest."""
    start = f"prediction, {document}, "
    kept: dict[str, tuple[int, Numbers]] = {}
    for name, cell in cells.items():
        if name.startswith(start):
            tokens, system = name.removeprefix(start).split(", ", 1)
            if int(tokens) > kept.get(system, (0, {}))[0]:
                kept[system] = int(tokens), cell
    windows = {kept[n][1]["dtype"]: kept[n][1] for n in (REFERENCE, "window") if n in kept}
    found = {}
    for system in names_in_order(kept):
        cell = kept[system][1]
        if system == REFERENCE or cell["dtype"] not in windows:
            continue
        nats = cell.get("nats", [])
        # Ranges that both read to the end of the shorter one: full attention ends where a range does.
        pairs = zip(nats, windows[cell["dtype"]]["nats"], strict=False)
        found[system] = Prediction(
            nats=nats,
            bits=cell.get("bits", []),
            changes=[100 * (mine / window - 1) for mine, window in pairs],
            seconds=1000 * cell["seconds"] / cell["tokens"],
            bytes=cell.get("bytes", 0),
            dtype=cell["dtype"],
            diverged=bool(cell.get("diverged")),
        )
    return found


def counts(cells: Cells) -> Counts:
    """(kind, task, length, system) → right answers and questions, of all seeds."""
    found: Counts = {}
    for name, cell in cells.items():
        kind, _, rest = name.partition(", ")
        if kind in HAYSTACKS:
            length, system = rest.rpartition(", seed ")[0].split(", ", 1)
            for task, (right, asked) in cell["right"].items():
                count = found.setdefault((kind, task, int(length), system), [0, 0])
                count[0], count[1] = count[0] + right, count[1] + asked
    return found


def ruler_scores(cells: Cells) -> dict[tuple[str, int, str], list[float]]:
    """(task, length, system) → the scores of all seeds."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for name, cell in cells.items():
        if name.startswith("ruler, "):
            task, length, system = name.rpartition(", seed ")[0].split(", ")[1:]
            found.setdefault((task, int(length), system), []).append(cell["score"])
    return found


def recall_by_length(cells: Cells, kinds: Iterable[str]) -> dict[str, dict[int, tuple[int, int]]]:
    """System → length → right answers and questions, of these kinds of haystacks together."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for (kind, _, length, system), (right, asked) in counts(cells).items():
        if kind in kinds:
            before = found.setdefault(system, {}).get(length, (0, 0))
            found[system][length] = before[0] + right, before[1] + asked
    return found


def compared(cells: Cells) -> tuple[str, list[Row]]:
    """The graft that is measured most, and what it and others are compared on."""
    documents = dict.fromkeys(name.split(", ")[1] for name in cells if name.startswith("prediction, "))
    rows = []
    for document in documents:
        found = predictions(cells, document)
        for at, (begin, end) in enumerate(RANGES):
            values = {
                name: -cell.changes[at]
                for name, cell in found.items()
                if len(cell.changes) > at and not cell.diverged
            }
            # A change of a percent is large, ten points of recall are not.
            rows.append(Row(f"{document}, tokens {begin:,} to {end:,}", values, "change", 10.0))
    for kind in HAYSTACKS:
        by_length = recall_by_length(cells, [kind])
        label = {"one": "single facts", "two": "two alike", "four": "four alike"}.get(kind, kind)
        for length in SAMPLES:
            values = {
                name: 100 * found[length][0] / found[length][1]
                for name, found in by_length.items()
                if length in found
            }
            rows.append(Row(f"{label}, haystacks of {length:,} tokens", values, "%"))
    scores = ruler_scores(cells)
    for task, length in dict.fromkeys(key[:2] for key in scores):
        values = {key[2]: 100 * sum(s) / len(s) for key, s in scores.items() if key[:2] == (task, length)}
        rows.append(Row(f"RULER's {task}, {length:,} tokens", values, "%"))
    values = {
        name.removeprefix("cloze, "): float(sum(cell["right"]))
        for name, cell in cells.items()
        if name.startswith("cloze, ")
    }
    rows.append(Row("sentences about an address", values, "of 20", 5.0))
    trained = [n for row in rows for n in row.values if n not in BASELINES and not n.endswith(" association")]
    graft = max(dict.fromkeys(trained), key=trained.count) if trained else "adaptation"
    return graft, [row for row in rows if graft in row.values and len(row.values) > 1]
