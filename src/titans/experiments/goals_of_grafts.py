"""The goals for a pretrained model with a memory, with what `graft-comparison` and `graft-training` found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from titans.experiments.goal import Goal
from titans.experiments.graft_comparison_found import RANGES, Prediction, predictions
from titans.experiments.held_out import BOOK, CODE, ESSAYS, PLAY, SPEECHES
from titans.experiments.results import Numbers

Cells = Mapping[str, Numbers]
TRAINED, UNTRAINED, WINDOW, FULL = "titans-smollm2-135m", "adaptation", "window", "full attention"
# Where what a memory is worth beyond attention begins.
FAR = 8192
# System, document, and by how many % the loss has to fall beyond that.
PREDICTION = (
    (UNTRAINED, BOOK, 1.3),
    (UNTRAINED, PLAY, 2.0),
    (TRAINED, PLAY, 4.0),
    (TRAINED, ESSAYS, 2.5),
    (TRAINED, SPEECHES, 2.5),
    (TRAINED, BOOK, 2.5),
    (TRAINED, CODE, 3.0),
)
# Tokens between statement and question, and how many % are to be recalled.
RECALL = {1024: 95, 16384: 90}
_NAMES = {UNTRAINED: "untrained graft", TRAINED: TRAINED}


def graft_goals(comparison: Cells, training: Cells) -> Iterator[Goal]:
    """Of the trained graft in the library and of a graft that nobody trained."""
    found = {document: predictions(comparison, document) for document in (PLAY, ESSAYS, SPEECHES, BOOK, CODE)}
    yield from _prediction_goals(comparison, found)
    yield from _recall_goals(comparison, training)
    yield from _cost_goals(found[PLAY])


def _prediction_goals(comparison: Cells, found: Mapping[str, Mapping[str, Prediction]]) -> Iterator[Goal]:
    for system, document, percent in PREDICTION:
        change = _beyond(comparison, document, system)
        yield Goal(
            f"{document} from token {FAR:,} on, {_NAMES[system]}: loss against the same window",
            f"−{percent:g} %",
            "" if change is None else _percent(change),
            None if change is None else change <= -percent,
            "graft-comparison",
        )
    near = RANGES.index((2048, 8192))
    both = {
        document: (systems[TRAINED].changes[near], systems[FULL].changes[near])
        for document, systems in found.items()
        if TRAINED in systems and FULL in systems
    }
    yield Goal(
        f"tokens {RANGES[near][0]:,} to {RANGES[near][1]:,}: of what full attention gains",
        "half",
        ", ".join(f"{document} {100 * ours / full:.0f} %" for document, (ours, full) in both.items()),
        all(ours <= full / 2 for ours, full in both.values()) if both else None,
        "graft-comparison",
    )
    worst = {
        document: max(systems[TRAINED].changes) for document, systems in found.items() if TRAINED in systems
    }
    yield Goal(
        f"{len(worst)} held-out documents, any range of positions, both memories: loss against the window",
        "worse by at most 0.1 %",
        f"at worst {_percent(max(worst.values()))} ({max(worst, key=worst.__getitem__)})" if worst else "",
        max(worst.values()) <= 0.1 if worst else None,
        "graft-comparison",
    )


def _beyond(comparison: Cells, document: str, system: str) -> float | None:
    """Change of the mean loss in % beyond `FAR`, by the cells that read furthest."""
    ours, window = (comparison.get(f"prediction, {document}, 65536, {name}") for name in (system, WINDOW))
    if not ours or not window or ours["tokens"] != window["tokens"]:
        return None
    tokens = [max(min(end, ours["tokens"]) - begin, 0) for begin, end in RANGES]
    far = [i for i, (begin, _) in enumerate(RANGES) if begin >= FAR and tokens[i]]
    sums = [sum(tokens[i] * cell["nats"][i] for i in far) for cell in (ours, window)]
    return 100 * (sums[0] / sums[1] - 1)


def _recall_goals(comparison: Cells, training: Cells) -> Iterator[Goal]:
    for wordings, name in (("known wordings", "wordings of training"), ("new wordings", "other wordings")):
        cells = [cell for key, cell in training.items() if key.endswith(f", {wordings}")]
        for tokens, percent in RECALL.items():
            shares = [100 * cell[str(tokens)][0] / cell[str(tokens)][1] for cell in cells]
            yield Goal(
                f"facts recalled after {tokens:,} tokens, {name}, mean of {len(shares)} trainings",
                f"≥ {percent} %",
                f"{statistics.mean(shares):.1f} %" if shares else "",
                statistics.mean(shares) >= percent if shares else None,
                "graft-training",
            )
    for what, key, percent in (
        ("single facts recalled in 262,144 tokens, generated", "one, 262144", 80),
        ("facts stated alike in 4,096 tokens, four numbers or four words, generated", "four, 4096", 80),
    ):
        cell = comparison.get(f"{key}, {TRAINED}, seed 0")
        counts = cell["right"].values() if cell else []
        right, asked = sum(count[0] for count in counts), sum(count[1] for count in counts)
        figures = f"{right} of {asked}" if cell else ""
        yield Goal(
            what,
            f"≥ {percent} %",
            figures,
            100 * right >= percent * asked if cell else None,
            "graft-comparison",
        )
    worst = [
        (100 * change, key.removesuffix(", texts"), text)
        for key, cell in training.items()
        if key.endswith(", texts")
        for text, change in cell.items()
        if isinstance(change, float)
    ]
    yield Goal(
        "held-out texts with the association alone: loss of the base",
        "worse by at most 0.1 %",
        "at worst {} ({}, {})".format(_percent(max(worst)[0]), *max(worst)[1:]) if worst else "",
        max(worst)[0] <= 0.1 if worst else None,
        "graft-training",
    )


def _cost_goals(found: Mapping[str, Prediction]) -> Iterator[Goal]:
    ours, window = found.get(TRAINED), found.get(WINDOW)
    yield Goal(
        "state of the memories",
        "≤ 8 MB",
        f"{ours.bytes / 1e6:.1f} MB" if ours else "",
        ours.bytes <= 8e6 if ours else None,
        "graft-comparison",
    )
    yield Goal(
        f"tokens/s of {PLAY}, one thread, float32: of the base's own in the same window",
        "≥ 80 %",
        f"{100 * window.seconds / ours.seconds:.0f} %" if ours and window else "",
        window.seconds >= 0.8 * ours.seconds if ours and window else None,
        "graft-comparison",
    )


def _percent(change: float) -> str:
    return f"{change:+.2f} %".replace("-", "−")
