"""The page of the comparison, from the cells that are measured: wins and losses, a picture, the tables."""

from __future__ import annotations

from collections.abc import Sequence

from titans.experiments.graft_comparison_cloze import SENTENCES
from titans.experiments.graft_comparison_found import (
    RANGES,
    Cells,
    Prediction,
    compared,
    counts,
    names_in_order,
    predictions,
    ruler_scores,
)
from titans.experiments.graft_comparison_picture import ABOUT_PICTURE, PICTURE
from titans.experiments.graft_comparison_systems import RATES, SEGMENT, WINDOW
from titans.experiments.graft_comparison_texts import HAYSTACKS, SAMPLES
from titans.experiments.held_out import BOOK, CODE, ESSAYS, PLAY, SPEECHES
from titans.experiments.results import Numbers
from titans.experiments.ruler import RULER_TASKS
from titans.experiments.tables import markdown, percent

DOCUMENTS = (PLAY, ESSAYS, SPEECHES, BOOK, CODE)


def page(cells: Cells) -> str:
    """All of it."""
    parts = [
        "SmolLM2-135M-Instruct reads a text once, from its first token on, and is then measured: how well it "
        f"predicts, and what it can answer. All systems but full attention see {WINDOW} tokens and 4 sinks; "
        "they differ in what they keep of the rest.",
        _systems(cells),
    ]
    if summary := _summary(cells):
        parts.append(summary)
    if cells:
        parts.append(f"![{ABOUT_PICTURE}]({PICTURE})")
    tables = [table for document in DOCUMENTS if (table := _prediction(cells, document))]
    if tables:
        parts += ["## Prediction", _ABOUT_PREDICTION, *tables]
    if table := _recall(cells):
        parts += ["## Facts from a haystack", _ABOUT_RECALL, table]
    if table := _ruler(cells):
        parts += ["## RULER", _ABOUT_RULER, table]
    if table := _cloze(cells):
        parts += ["## Twenty sentences about an address", _ABOUT_CLOZE, table]
    parts += ["## Settings", _tuning(cells)]
    return "\n\n".join(parts)


_KEEPS = {
    "window": "nothing",
    "full attention": "all keys and values, up to 8,192 positions; of a longer text it reads the end",
    "cache": "a continuous cache (kNN): all hidden states and the tokens that followed",
    "small cache": "a continuous cache of as many bytes as the adaptation's state",
    "dynamic SGD": f"all weights, after a step of SGD for each {SEGMENT} tokens (dynamic evaluation)",
    "dynamic Adam": "the same with Adam",
    "dynamic LoRA": "a LoRA of rank 8 in all linear layers, learned so with Adam",
    "passages": "the text; before a question BM25 (bm25s) puts the best passages of 60 words into the window",
    "adaptation": "the untrained graft, `titans.graft(model)`, without a warm-up: a fast matrix and bias "
    "in parallel with the head",
}
_ABOUT_PREDICTION = (
    "Change of the loss against the window in %, by position; the change of bits per byte is the same. "
    "Seconds are processor seconds of one thread on a busy machine. “–”: beyond what a system reads, or not "
    "measured yet."
)
_ABOUT_RECALL = (
    "Right answers in % with 95 % interval, generated greedily and exact. Facts stand in the first half of "
    "the haystack, text of the documents above. number, word, passkey: one of each in a haystack, in RULER's "
    "words, which no graft was trained on; of two, of four: as many numbers and as many words, which differ "
    "in name and value; values: two numbers of one name, both asked for. known wordings: four facts, mostly "
    "alike, in wordings that grafts are trained on, with other names and values; new wordings: in others. "
    "qa1 to qa3: a story of bAbI's kind. Answers are generated whole, each from its question alone; "
    "[trained grafts](graft-training.md) judges each token after the right ones, so its shares are higher."
)
_ABOUT_RULER = (
    "RULER's own tasks, from the package nvidia-long-context-eval 26.3: its generators, haystacks, prompts "
    "and score (the share of the expected strings that occur in the answer), in %, and how many samples were "
    "asked. One thing is not its own: sentences of essays are divided by punctuation, not by NLTK."
)
_ABOUT_CLOZE = (
    "After the State of the Union of 2002 (4,700 tokens) each sentence is completed. Right, in bold: the "
    "first line generated, of at most 10 tokens, contains the answer as whole words. The sentences were "
    "written before any system was asked, and all are shown."
)


def _systems(cells: Cells) -> str:
    """What each system keeps, its bytes and seconds on the play."""
    found = predictions(cells, PLAY)
    trained = [name for name in names_in_order([*found, *_asked(cells)]) if name not in _KEEPS]
    keeps = dict(_KEEPS)
    for name in trained:
        alone = name.endswith(" association")
        keeps[name] = (
            "its association alone" if alone else f"a trained graft{_weights(cells, name)}: both memories"
        )
    rows = []
    for name, what in keeps.items():
        cell = found.get(name)
        rows.append([f"**{name}**", what, _size(cell.bytes) if cell else "–", _speed(cell) if cell else "–"])
    head = ["system", "keeps", f"bytes after {PLAY}", "seconds for 1K tokens"]
    about = (
        "Bytes are those held in addition to the window's keys and values, which take 24 MB in float32; full "
        "attention has no window. Seconds are of float32; bfloat16 takes half on this machine. Systems that "
        "read a text through the same window (all but full attention, passages, dynamic evaluation and "
        "grafts with a LoRA) share what the base computes for it, and the seconds of each, here and below, "
        "count it as if that system had read alone."
    )
    return f"{markdown(head, rows)}\n\n{about}"


def _weights(cells: Cells, system: str) -> str:
    """Which weights a trained graft had, for the reader who asks whether they are the present ones."""
    hashes = {c["weights"] for n, c in cells.items() if "weights" in c and system in n.split(", ")}
    return f" (sha256 {' and '.join(sorted(hashes))})" if hashes else ""


def _asked(cells: Cells) -> list[str]:
    return [key[3] for key in counts(cells)]


def _summary(cells: Cells) -> str:
    """Where the graft is better or worse than every other system, the largest difference first."""
    graft, rows = compared(cells)
    wins, losses, untrained = [], [], []
    for row in rows:
        mine = row.values[graft]
        others = {n: v for n, v in row.values.items() if not n.startswith(graft) and n != "adaptation"}
        if others:
            best = max(others, key=lambda name: others[name])
            shown = f"{row.label}: {row.show(mine)}; {best} {row.show(others[best])}"
            gain = (mine - others[best]) * row.weight
            (wins if gain > 0 else losses).append((abs(gain), shown))
        if row.values.get("adaptation", mine) > mine:
            untrained.append(f"{row.label} ({row.show(row.values['adaptation'])})")
    if not rows:
        return ""
    parts = [
        "## What the graft loses and wins",
        f"**{graft}** compared with the best of the other systems that were measured on the same, which "
        "are not all (see the tables); largest differences first. Prediction: change of the loss "
        "against the window.",
    ]
    for title, found in (("It loses, or does no better:", losses), ("It wins:", wins)):
        if found:
            parts += [title, "\n".join(f"- {text}." for _, text in sorted(found, reverse=True))]
    if untrained:
        parts.append(f"The untrained graft does better than it with {'; '.join(untrained)}.")
    return "\n\n".join(parts)


def _prediction(cells: Cells, document: str) -> str:
    """Nats of the window, the change of each system in %, and costs."""
    found = predictions(cells, document)
    window = found.get("window")
    if window is None:
        return ""
    ranges = RANGES[: max(len(cell.nats) for cell in found.values())]
    rows = [
        ["window, nats a token", *_padded([f"{x:.3f}" for x in window.nats], ranges), _speed(window), "0"],
        ["window, bits per byte", *_padded([f"{x:.3f}" for x in window.bits], ranges), "", ""],
    ]
    for name, cell in found.items():
        if name == "window":
            continue
        label = name if cell.dtype == window.dtype else f"{name} ({cell.dtype})"
        shown = ["diverged"] * len(ranges) if cell.diverged else [f"{x:+.2f}" for x in cell.changes]
        rows.append(
            [label, *_padded(shown, ranges), _speed(cell), "" if cell.diverged else _size(cell.bytes)]
        )
    head = [f"{document} ({window.dtype})", *(f"{a:,}–{b:,}" for a, b in ranges), "seconds for 1K", "bytes"]
    return markdown(head, rows)


def _padded(texts: Sequence[str], ranges: Sequence[tuple[int, int]]) -> list[str]:
    return [*texts, *["–"] * (len(ranges) - len(texts))]


def _speed(cell: Prediction) -> str:
    return f"{cell.seconds:.1f}"


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count else "0"


def _recall(cells: Cells) -> str:
    counted = counts(cells)
    names = names_in_order([key[3] for key in counted])
    rows = []
    for kind, task in dict.fromkeys(key[:2] for key in sorted(counted, key=lambda k: HAYSTACKS.index(k[0]))):
        for length in SAMPLES:
            found = [counted.get((kind, task, length, name)) for name in names]
            if any(found):
                label = {"one": task, "two": f"{task}, of two", "four": f"{task}, of four"}.get(kind, task)
                rows.append([label, f"{length:,}", *(percent(*c) if c else "–" for c in found)])
    return markdown(["task", "tokens", *names], rows) if rows else ""


def _ruler(cells: Cells) -> str:
    scores = ruler_scores(cells)
    names = names_in_order([key[2] for key in scores])
    rows = []
    for length in dict.fromkeys(key[1] for key in sorted(scores, key=lambda k: k[1])):
        for task in RULER_TASKS:
            found = [scores.get((task, length, name)) for name in names]
            if any(found):
                shown = (f"{100 * sum(s) / len(s):.0f} ({len(s)})" if s else "–" for s in found)
                rows.append([task, f"{length:,}", *shown])
    return markdown(["task", "tokens", *names], rows) if rows else ""


def _cloze(cells: Cells) -> str:
    start = "cloze, "
    found = {name.removeprefix(start): cell for name, cell in cells.items() if name.startswith(start)}
    names = names_in_order([*found])
    if not names:
        return ""
    rows = [["**right, of 20**", "", *(f"**{sum(found[name]['right'])}**" for name in names)]]
    for number, (sentence, answer) in enumerate(SENTENCES):
        given = []
        for name in names:
            text, right = found[name]["given"][number], found[name]["right"][number]
            text = text.replace("|", "/").replace("*", "") or "(nothing)"
            given.append(f"**{text}**" if right else text)
        rows.append([f"{sentence} …", answer.split("/")[0], *given])
    return markdown(["sentence", "answer", *names], rows)


def _tuning(cells: Cells) -> str:
    parts = []
    if cell := cells.get("tuning, cache"):
        rows: dict[str, list[str]] = {}
        for setting, nats in cell["nats"].items():
            weight, sharpness, size = setting.split(", ")
            rows.setdefault(f"{sharpness}, {size}", []).append(f"{nats:.4f}")
        weights = dict.fromkeys(setting.split(", ")[0] for setting in cell["nats"])
        head = ["sharpness, entries", *(f"weight {weight}" for weight in weights)]
        about = (
            f"Mean nats of the first {cell['tokens']:,} tokens of {cell['document']} with a continuous cache."
        )
        parts.append(f"{about}\n\n{markdown(head, ([name, *values] for name, values in rows.items()))}")
    else:
        parts.append(
            "Weight and sharpness of the caches come from trials on Moby Dick (docs/notebook/"
            "2026-11-30-graft-comparison.md); the cell that chooses them is not measured yet."
        )
    tried = [_rate(name, cell) for name, cell in cells.items() if name.startswith("tuning, ")]
    if lines := [line for line in tried if line]:
        cell = next(c for n, c in cells.items() if n.startswith("tuning, ") and n != "tuning, cache")
        about = (
            f"Mean nats of the first {cell['tokens']:,} tokens of {cell['document']} with dynamic evaluation."
        )
        parts.append(f"{about}\n\n{markdown(['weights', 'rate', 'nats'], lines)}")
    else:
        parts.append("The cells that choose the rates of dynamic evaluation are not measured yet.")
    return "\n\n".join(parts)


def _rate(name: str, cell: Numbers) -> list[str]:
    """The line of one rate of dynamic evaluation; empty for the cell of the caches."""
    if name == "tuning, cache":
        return []
    kind, rate = name.split(", ")[1:]
    chosen = " (chosen)" if float(rate) == RATES[kind] else ""
    return [kind, f"{rate}{chosen}", "diverged" if cell.get("diverged") else f"{cell['nats']:.4f}"]
