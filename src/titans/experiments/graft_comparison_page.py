"""The tables of the comparison, from the cells that are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from titans.experiments.graft_comparison_systems import BASELINES, RATES, SEGMENT, WINDOW
from titans.experiments.graft_comparison_texts import HAYSTACKS, PLAY_QUESTIONS, PLAY_TOKENS, SAMPLES
from titans.experiments.held_out import BOOK, CODE, PLAY, SPEECH
from titans.experiments.results import Numbers
from titans.experiments.tables import markdown, percent

RANGES = ((0, 512), (512, 2048), (2048, 8192), (8192, 16384), (16384, 65536))
SHORT, LONG = 16384, 65536
Cells = Mapping[str, Numbers]
Counts = dict[tuple[str, str, int, str], list[int]]


def page(cells: Cells) -> str:
    """All tables."""
    parts = [
        "smollm2-135m (SmolLM2-135M-Instruct, dequantised from 4 bits) in float32 reads each text "
        f"once, from its first token on. All systems but full attention see a window of {WINDOW} "
        "tokens, and 4 sinks. **window**: nothing else. **full attention**: transformers' own cache, "
        "up to 8,192 positions; of a longer haystack it reads the end. **cache**: a continuous cache "
        "(kNN) of all hidden states; **small cache**: of as many bytes as the adaptation's state. "
        f"**dynamic**: dynamic evaluation, a step for each {SEGMENT} tokens, of all weights (SGD, "
        "Adam) or of a LoRA of rank 8 in all linear layers (Adam). **passages**: BM25 (bm25s) puts "
        "the best passages of 60 words before the question; the model reads nothing else. "
        "**adaptation**: the untrained graft, `titans.graft(model)`. Others: trained grafts. Seconds "
        "are processor seconds of one thread on a busy machine; bytes are those held besides the "
        "window's keys and values (24 MB). “–”: not measured yet, or beyond what a system reads."
    ]
    if summary := _summary(cells):
        parts += ["## Where the graft loses", summary]
    parts.append("## Prediction")
    for document in (PLAY, BOOK, SPEECH, CODE):
        if table := _prediction(cells, document):
            parts.append(table)
    if counted := _counts(cells):
        parts += ["## Facts from a haystack", _recall(counted)]
    if table := _play(cells):
        parts += ["## Questions about King Lear", table]
    parts += ["## Settings", _tuning(cells)]
    return "\n\n".join(parts)


def _names(found: Sequence[str]) -> list[str]:
    """Systems in the order of the baselines, then trained grafts."""
    known = [name for name in BASELINES if name in found]
    return known + sorted({*found} - {*BASELINES})


def _losses(cells: Cells, document: str) -> dict[str, Numbers]:
    """Of each system, the cell that reads furthest."""
    found: dict[str, Numbers] = {}
    for tokens in (SHORT, LONG):
        start = f"prediction, {document}, {tokens}, "
        found |= {name.removeprefix(start): cell for name, cell in cells.items() if name.startswith(start)}
    return {name: found[name] for name in _names([*found])}


def _prediction(cells: Cells, document: str) -> str:
    """Nats of the window and the change of each system in %, bits per byte, and costs."""
    found = _losses(cells, document)
    if "window" not in found:
        return ""
    window = found["window"]
    ranges = RANGES[: max(len(cell.get("nats", ())) for cell in found.values())]
    rows = [
        [
            "window, nats a token",
            *_padded([f"{x:.3f}" for x in window["nats"]], len(ranges)),
            _speed(window),
            "0",
        ],
        ["window, bits per byte", *_padded([f"{x:.3f}" for x in window["bits"]], len(ranges)), "", ""],
    ]
    for name, cell in found.items():
        if name == "window":
            continue
        if cell.get("diverged"):
            rows.append([name, *["diverged"] * len(ranges), _speed(cell), ""])
            continue
        changes = [f"{100 * (a / b - 1):+.2f}" for a, b in zip(cell["nats"], window["nats"], strict=False)]
        # Full attention ends within a range where the model's positions do, at its end.
        rows.append([name, *_padded(changes, len(ranges)), _speed(cell), _size(cell["bytes"])])
    head = [
        f"{document}: change of nats, %",
        *(f"{a:,}–{b:,}" for a, b in ranges),
        "seconds for 1K tokens",
        "bytes",
    ]
    return markdown(head, rows)


def _padded(texts: Sequence[str], count: int) -> list[str]:
    return [*texts, *["–"] * (count - len(texts))]


def _speed(cell: Numbers) -> str:
    return f"{1000 * cell['seconds'] / cell['tokens']:.1f}"


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count else "0"


def _counts(cells: Cells) -> Counts:
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


def _recall(counted: Counts) -> str:
    names = _names([key[3] for key in counted])
    rows = []
    for kind, task in dict.fromkeys(key[:2] for key in sorted(counted, key=lambda k: HAYSTACKS.index(k[0]))):
        for length in SAMPLES:
            cells = [counted.get((kind, task, length, name)) for name in names]
            if any(cells):
                label = {"one": task, "two": f"{task}, of two", "four": f"{task}, of four"}.get(kind, task)
                rows.append([label, f"{length:,}", *(percent(*c) if c else "–" for c in cells)])
    about = (
        "Answers generated greedily and exact, % with 95 % interval. Facts stand in the first half "
        "of the haystack, text of the documents above. number, word, passkey: one of each in a "
        "haystack, in RULER's words, which no graft was trained on; of two, of four: as many "
        "numbers and as many words, which differ in name and value; values: two numbers of one "
        "name, both asked for. known wordings: four facts, mostly alike, in wordings that grafts "
        "are trained on, with other names and values; new wordings: in others. qa1 to qa3: a story "
        "of bAbI's kind."
    )
    return f"{about}\n\n{markdown(['task', 'tokens', *names], rows)}"


def _play(cells: Cells) -> str:
    start = "play questions, "
    found = {name.removeprefix(start): cell for name, cell in cells.items() if name.startswith(start)}
    names = _names([*found])
    if not names:
        return ""
    rows = [["**right, of 20**", "", *(f"**{sum(found[name]['right'])}**" for name in names)]]
    for number, (question, answer) in enumerate(PLAY_QUESTIONS):
        given = []
        for name in names:
            text, right = found[name]["given"][number], found[name]["right"][number]
            text = text.replace("|", "/").replace("*", "") or "(nothing)"
            given.append(f"**{text}**" if right else text)
        rows.append([question, answer.split("/")[0], *given])
    about = (
        f"After the first {PLAY_TOKENS:,} tokens; the first line generated after the question as a turn of "
        "the model's own template. Right, in bold: it contains the answer as whole words."
    )
    return f"{about}\n\n{markdown(['question', 'answer', *names], rows)}"


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
    lines = []
    for name, cell in cells.items():
        if name.startswith("tuning, ") and name != "tuning, cache":
            kind, rate = name.split(", ")[1:]
            chosen = " (chosen)" if float(rate) == RATES[kind] else ""
            shown = "diverged" if cell.get("diverged") else f"{cell['nats']:.4f}"
            lines.append((cell, [kind, f"{rate}{chosen}", shown]))
    if lines:
        about = f"The same of its first {lines[0][0]['tokens']:,} tokens with dynamic evaluation."
        parts.append(f"{about}\n\n{markdown(['weights', 'rate', 'nats'], (row for _, row in lines))}")
    else:
        parts.append("The cells that choose the rates of dynamic evaluation are not measured yet.")
    return "\n\n".join(parts)


def _summary(cells: Cells) -> str:
    """Where another system is better than the untrained graft, the largest difference first."""
    worse: list[tuple[float, str]] = []
    for document in (PLAY, BOOK, SPEECH, CODE):
        found = _losses(cells, document)
        graft = found.get("adaptation")
        for name, cell in found.items():
            if graft is None or name == "adaptation" or "nats" not in cell:
                continue
            pairs = list(zip(RANGES, cell["nats"], graft["nats"], strict=False))
            less = [(100 * (1 - mine / theirs), span) for span, mine, theirs in pairs if mine < theirs]
            if less:
                most, (begin, end) = max(less)
                worse.append(
                    (most, f"{document}: {name} predicts up to {most:.1f} % better ({begin:,}–{end:,})")
                )
    counted = _counts(cells)
    total: dict[str, list[int]] = {}
    for (kind, task, length, name), (right, asked) in counted.items():
        if (kind, task, length, "adaptation") in counted:
            count = total.setdefault(name, [0, 0])
            count[0], count[1] = count[0] + right, count[1] + asked
    lines = [f"- {text}." for _, text in sorted(worse, reverse=True)]
    if total:
        shares = ", ".join(
            f"{name} {100 * total[name][0] / total[name][1]:.0f} %" for name in _names([*total])
        )
        lines.append(f"- Facts from haystacks, all that the adaptation was asked: {shares}.")
    return "\n".join(lines)
