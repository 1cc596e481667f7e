"""What the paper claims, as comparisons of two systems, and what decides them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from titans.experiments.tables import T_95

Word = Literal["reproduced", "not reproduced", "not decided", "not testable here"]
# Fewer seeds decide nothing.
FEWEST_SEEDS = 3


@cache
def paper(table: str) -> dict[str, Any]:
    """The figures of a table: `source`, `columns`, and `rows` by group and by system."""
    text = (resources.files("titans.experiments.reproduce") / "paper.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)[table]
    return found


def figure(table: str, group: str, row: str, column: str | None = None) -> float:
    """One figure of the paper, or without a column the mean of a row."""
    about = paper(table)
    values: list[float] = about["rows"][group][row]
    return statistics.mean(values) if column is None else values[about["columns"].index(column)]


@dataclass(frozen=True)
class Claim:
    """That one system is better than another.

    text: in words. source: table and row. better, than: labels of what is measured. key: the number that is
    compared. lower: whether less is better. figures: the paper's two, in this order, or None where it only
    draws them. unavailable: why it cannot be tested here; empty where it can. floor: what a system exceeds
    that has learned anything at all; where neither does, nothing is compared.
    """

    text: str
    source: str
    better: str = ""
    than: str = ""
    key: str = ""
    lower: bool = False
    figures: tuple[float, float] | None = None
    unavailable: str = ""
    floor: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict and its reason, our two means, their difference and half its 95 % interval."""

    claim: Claim
    word: Word
    ours: tuple[float, float] | None = None
    difference: float | None = None
    half: float | None = None
    reason: str = ""


def decide(claim: Claim, values: Mapping[str, Mapping[int, float]], quick: bool) -> Verdict:
    """The verdict on a claim.

    The differences of the two systems, paired by seed, have a mean with a 95 % interval (Student's t). A
    claim is reproduced where the interval lies on its side of 0, and not reproduced where it lies on the
    other. An interval that holds 0, a quick run, fewer than three seeds, or two systems that have not learned
    the task decide nothing.

    Args:
        values: label → seed → number.
    """
    if claim.unavailable:
        return Verdict(claim, "not testable here", reason=claim.unavailable)
    first, second = values.get(claim.better, {}), values.get(claim.than, {})
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return Verdict(claim, "not decided", reason="not measured yet")
    ours = statistics.mean(first[n] for n in seeds), statistics.mean(second[n] for n in seeds)
    differences = [first[n] - second[n] for n in seeds]
    mean, half = statistics.mean(differences), half_interval(differences)
    found = dict(claim=claim, ours=ours, difference=mean, half=half)
    if quick:
        return Verdict(word="not decided", reason="a quick run", **found)
    if half is None or len(seeds) < FEWEST_SEEDS:
        return Verdict(word="not decided", reason=f"{len(seeds)} of {FEWEST_SEEDS} seeds", **found)
    if claim.floor is not None and max(ours) <= claim.floor:
        return Verdict(word="not decided", reason=f"neither exceeds {claim.floor:g}", **found)
    gain = -mean if claim.lower else mean
    if gain > half:
        return Verdict(word="reproduced", **found)
    if -gain > half:
        return Verdict(word="not reproduced", reason="the other way round", **found)
    return Verdict(word="not decided", reason="no difference beyond the interval", **found)


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return T_95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
