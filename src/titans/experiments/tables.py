"""Numbers as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from titans.evaluate.needle import wilson

# Student's t for a 95 % interval of the mean of so many values.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def percent(correct: int, samples: int) -> str:
    """A share in % with its Wilson interval of 95 %."""
    low, high = wilson(correct, samples)
    return f"{100 * correct / samples:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean over seeds and its 95 % interval, Student's t."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    half = T_95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"
