"""The goals and what was reached: each goal is a ratio of two rows of one run."""

from __future__ import annotations

from typing import Any

from report import best_rate, same_shape_rate, table

Row = dict[str, Any]
NATIVE, BFLOAT16, TORCH = "titans, native", "titans, bfloat16", "titans, torch"
LAYER = dict(kind="layer", width=256, expansion=4, chunk=64)


def _find(rows: list[Row], contender: str, threads: int = 1, **case: Any) -> Row | None:
    return next(
        (
            row
            for row in rows
            if row["contender"] == contender and row["threads"] == threads and "median" in row
            if case.items() <= row["case"].items()
        ),
        None,
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _times(rows: list[Row], slow: str, fast: str, threads: int = 1, **case: Any) -> float | None:
    """How many times as long the first takes."""
    a, b = _find(rows, slow, threads, **case), _find(rows, fast, threads, **case)
    return a["median"] / b["median"] if a and b else None


def _scan(rows: list[Row], contender: str, chunk: int, backward: bool, of_products: bool) -> float | None:
    """Rate of a scan as a part of the machine's, in per cent."""
    row = _find(rows, contender, kind="scan", width=256, expansion=4, chunk=chunk, backward=backward)
    rate = same_shape_rate(rows, 1, chunk) if of_products else best_rate(rows, 1)
    return 100 * row["rate"] / rate if row and rate else None


def goals(rows: list[Row]) -> str:
    """A table: goal, figure, reached or not."""
    lines: list[list[str]] = []

    def add(what: str, goal: float, found: float | None, unit: str, at_most: bool = False) -> None:
        if found is None:
            return
        reached = found <= goal if at_most else found >= goal
        sign, digits = "≤" if at_most else "≥", 0 if unit == " %" else 2
        lines.append(
            [what, f"{sign} {goal:g}{unit}", f"{found:.{digits}f}{unit}", "yes" if reached else "no"]
        )

    for chunk in (16, 64):
        for backward, goal in ((False, 60), (True, 45)):
            name = "forward + backward" if backward else "forward"
            found = _scan(rows, NATIVE, chunk, backward, False)
            add(f"native, chunk {chunk}, {name}: of the best rate", goal, found, " %")
    for chunk, forward, both in ((64, 70, 50), (16, 60, 45)):
        for backward, goal in ((False, forward), (True, both)):
            name = "forward + backward" if backward else "forward"
            found = _scan(rows, TORCH, chunk, backward, True)
            add(f"torch path, chunk {chunk}, {name}: of same-shape bmm", goal, found, " %")
    trained = dict(**LAYER, time=4096, backward=True)
    for threads in (1, 2):
        for peer, goal in (("titans-pytorch", 2.5), ("titans-pytorch, sequential", 5)):
            found = _times(rows, peer, NATIVE, threads, **trained)
            add(f"layer, 4,096 tokens, forward + backward, {_threads(threads)}: {peer}", goal, found, "×")
    found = _times(rows, "titans-pytorch, per token", NATIVE, **LAYER, time=1024, backward=True)
    add("the same at 1,024 tokens: titans-pytorch, per token", 100, found, "×")
    found = _times(rows, NATIVE, BFLOAT16, **trained)
    add("layer, operands in bfloat16 compared with float32", 1, found, "×")
    ours, peer = (_find(rows, name, **trained) for name in (NATIVE, "titans-pytorch"))
    if ours and peer and ours.get("bytes") and peer.get("bytes"):
        add(
            "layer, peak training memory: of titans-pytorch's",
            25,
            100 * ours["bytes"] / peer["bytes"],
            " %",
            True,
        )
    for kind in ("equal scan", "equal layer"):
        for chunk in (16, 64):
            for backward in (False, True):
                case = dict(kind=kind, chunk=chunk, backward=backward)
                found = _times(rows, "linear, native", "sin features, native", **case)
                name = "forward + backward" if backward else "forward"
                what = (
                    f"sin features, {kind.split()[1]}, chunk {chunk}, {name}: of a linear memory's tokens/s"
                )
                add(what, 70, None if found is None else 100 * found, " %")
    for kind, what in (("train", "training"), ("prefill", "reading")):
        for segment, threads in ((64, 1), (64, 2), (512, 1)):
            case = dict(kind=kind, variant="mac", time=2048, segment=segment)
            for peer, goal in (("titans-pytorch", 2), ("open-titans", 1.5)):
                name = f"{what} with the 10M MAC, 2,048 tokens, segments of {segment}, {_threads(threads)}"
                add(f"{name}: {peer}", goal, _times(rows, peer, NATIVE, threads, **case), "×")
                ours, its = (_find(rows, contender, threads, **case) for contender in (NATIVE, peer))
                if kind == "train" and ours and its and ours.get("bytes") and its.get("bytes"):
                    add(f"{name}, memory: of {peer}'s", 50, 100 * ours["bytes"] / its["bytes"], " %", True)
    long = _find(rows, NATIVE, kind="train", variant="mac", time=16384)
    if long and long.get("bytes"):
        add("training the 10M MAC, 16,384 tokens a row, memory", 24, long["bytes"] / 1e9, " GB", True)
    for variant, goals_at in (("lmm", ((4096, 2), (16384, 1))), ("mag", ((4096, 2.5), (16384, 1)))):
        for time, goal in goals_at:
            model = _find(rows, NATIVE, kind="train", variant=variant, time=time)
            transformer = _find(rows, "attention", kind="train", time=time)
            if model and transformer:
                what = f"training step, 10M {variant.upper()}, {time:,} tokens: of the transformer's"
                add(what, goal, model["median"] / transformer["median"], "×", True)
    streams = [row for row in rows if row["case"]["kind"] == "stream" and "median" in row]
    if streams:
        per_token = [row["median"] / row["case"]["time"] for row in streams]
        spread = 100 * (max(per_token) / min(per_token) - 1)
        add("cost per token, 4,096 to 1,048,576 tokens: largest above smallest", 10, spread, " %", True)
    for kind in ("decode", "generate"):
        for variant in ("lmm", "mac", "mag"):
            ours = _find(rows, NATIVE, kind=kind, variant=variant, memory_depth=1)
            theirs = _find(rows, "transformers", kind=kind)
            if ours and theirs:
                what = f"{kind}, 8M {variant.upper()}, 1,024 tokens: of transformers' tokens/s, equal sizes"
                add(what, 2, theirs["median"] / ours["median"], "×")
    transformer = _find(rows, "attention", kind="decode", time=1024)
    early, late = (_find(rows, NATIVE, kind="decode", variant="mac", time=t) for t in (1024, 16384))
    if early and transformer:
        what = "decoding with the 10M MAC, 1,024 tokens: of the transformer's time"
        add(what, 4, early["median"] / transformer["median"], "×", True)
    if early and late:
        what = "decoding with the 10M MAC after 16,384 tokens: of that after 1,024"
        add(what, 1.1, late["median"] / early["median"], "×", True)
    return table(["goal (one thread unless stated)", "wanted", "found", "reached"], lines)
