"""Tables and a picture of what was timed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from contenders import floating_operations

Row = dict[str, Any]
# A ratio of times above this counts as slower.
SLOWER = 1.03
COLOURS = {
    "titans, native": "tab:red",
    "titans, bfloat16": "tab:pink",
    "titans, torch": "tab:orange",
    "attention": "tab:blue",
    "titans-pytorch": "tab:green",
    "titans-pytorch, sequential": "tab:olive",
    "titans-pytorch, per token": "tab:brown",
}


def _spread(row: Row) -> str:
    """Largest over smallest of the times, as a percentage above 1."""
    return f"{100 * (max(row['seconds']) / min(row['seconds']) - 1):.0f} %"


def _tokens(row: Row) -> float:
    case = row["case"]
    return (16 if case["kind"] in ("decode", "generate") else case["time"]) / row["median"]


def _megabytes(row: Row) -> str:
    return "–" if row.get("bytes") is None else f"{row['bytes'] / 2**20:.0f}"


def best_rate(rows: list[Row], threads: int) -> float:
    """The roofline: the best rate in float32 of any product or scan, in operations per second."""
    rates = [
        r["rate"]
        for r in rows
        if r["threads"] == threads and "rate" in r and r["contender"] != "titans, bfloat16"
    ]
    return max(rates, default=float("nan"))


def same_shape_rate(rows: list[Row], threads: int, chunk: int) -> float | None:
    """The best rate of batched products of a chunk's shapes."""
    rates = [
        r["rate"]
        for r in rows
        if r["case"]["kind"] == "product" and r["threads"] == threads and r["case"]["shape"][1] == chunk
        if r["case"]["shape"][0] > 1 and "rate" in r
    ]
    return max(rates, default=None)


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _products(rows: list[Row]) -> str:
    lines = [
        [
            "{} × ({} × {}) ({} × {})".format(*r["case"]["shape"][:3], *r["case"]["shape"][2:]),
            str(r["threads"]),
            f"{r['rate'] / 1e9:.0f}",
            _spread(r),
        ]
        for r in rows
        if r["case"]["kind"] == "product" and "rate" in r
    ]
    return table(["product", "threads", "GFLOP/s", "spread"], lines)


def _scans(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        case = r["case"]
        if case["kind"] != "scan":
            continue
        sizes = [str(case[x]) for x in ("width", "expansion", "chunk", "time")]
        head = [*sizes, "forward + backward" if case["backward"] else "forward", str(r["threads"])]
        if "median" not in r:
            lines.append([*head, r["contender"], r.get("error", "–"), "", "", "", "", ""])
            continue
        shape_rate = same_shape_rate(rows, r["threads"], case["chunk"])
        lines.append(
            [
                *head,
                r["contender"],
                f"{_tokens(r):,.0f}",
                f"{r['rate'] / 1e9:.0f}",
                f"{100 * r['rate'] / best_rate(rows, r['threads']):.0f} %",
                f"{100 * r['rate'] / shape_rate:.0f} %" if shape_rate else "–",
                _megabytes(r),
                _spread(r),
            ]
        )
    head = ["width", "expansion", "chunk", "tokens", "pass", "threads", "backend", "tokens/s", "GFLOP/s"]
    return table([*head, "of the best rate", "of same-shape bmm", "MB", "spread"], lines)


def _others(rows: list[Row], kinds: tuple[str, ...]) -> str:
    """Cases as rows, contenders as columns: tokens per second, megabytes."""
    rows = [r for r in rows if r["case"]["kind"] in kinds]
    contenders = list(dict.fromkeys(r["contender"] for r in rows))
    cases: dict[str, list[Row]] = {}
    for r in rows:
        cases.setdefault(str((r["case"], r["threads"])), []).append(r)
    lines = []
    for together in cases.values():
        case = together[0]["case"]
        what = ", ".join(
            (("forward + backward" if value else "forward") if name == "backward" else f"{name} {value}")
            for name, value in case.items()
            if name != "kind" or len(kinds) > 1
        )
        cells = {
            r["contender"]: (
                f"{_tokens(r):,.0f} ({_megabytes(r)} MB, ±{_spread(r)})"
                if "median" in r
                else r.get("error", "–")
            )
            for r in together
        }
        lines.append([what, str(together[0]["threads"]), *(cells.get(c, "") for c in contenders)])
    return table(["case", "threads", *contenders], lines)


def tables(about: str, rows: list[Row]) -> str:
    """Everything as Markdown; a contender that ran nowhere is listed once, with the reason."""
    ran = {r["contender"] for r in rows if "median" in r}
    refused = {r["contender"]: r["error"] for r in rows if r["contender"] not in ran and "error" in r}
    rows = [r for r in rows if r["contender"] in ran]
    parts = [about, *(f"Not here: {name} ({reason})." for name, reason in refused.items())]
    parts.append("### The machine\n\n" + _products(rows))
    if any(r["case"]["kind"] == "scan" for r in rows):
        parts.append("### The memory alone (`memory_scan`)\n\n" + _scans(rows))
    for title, kinds in (
        ("A layer with its projections, tokens/s", ("layer",)),
        ("Memories of equal state, 4 heads of 4,096 fast weights, tokens/s", ("equal scan", "equal layer")),
        ("A layer that reads on and on, tokens/s", ("stream",)),
        ("Whole models, tokens/s", ("train", "prefill", "decode", "generate")),
    ):
        if any(r["case"]["kind"] in kinds for r in rows):
            parts.append(f"### {title}\n\n{_others(rows, kinds)}")
    return "\n\n".join(parts) + "\n"


def paired(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Each row that was timed with another checkout of the library, after the row of this one."""
    key = ("case", "threads", "contender")
    return [
        (now, before)
        for before in rows
        for now in rows
        if before.get("before") and not now.get("before") and all(now[k] == before[k] for k in key)
    ]


def compared_times(row: Row) -> list[float]:
    """Processor time of one thread; with several, which may wait for each other, time that has passed."""
    return row["processor"] if row["threads"] == 1 else row["seconds"]


def ratios(now: Row, before: Row) -> tuple[float, float, float]:
    """Time now, in parts of the time before, turn by turn: lower quartile, median, upper quartile."""
    found = [a / b for a, b in zip(compared_times(now), compared_times(before), strict=False)]
    if not found:
        return (math.nan,) * 3
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def comparison(rows: list[Row]) -> tuple[str, bool]:
    """This library and another checkout of it, as Markdown, and whether a row is slower or has failed."""
    lines, worse = [], []
    for now, before in paired(rows):
        case, (low, middle, high) = now["case"], ratios(now, before)
        what = ", ".join(f"{name} {value}" for name, value in case.items())
        failed = now.get("error") or before.get("error")
        verdict = f"FAILED: {failed}" if failed else "SLOWER" if middle > SLOWER else ""
        times = [
            f"{1000 * np.median(compared_times(row)):.4g}" if row["seconds"] else "–" for row in (before, now)
        ]
        spread = f"{low:.3f} to {high:.3f}"
        head = [what, str(now["threads"]), now["contender"], *times]
        lines.append([*head, f"{middle:.3f}", spread, str(len(now["seconds"])), verdict])
        worse += [verdict] if verdict else []
    head = ["case", "threads", "contender", "before, ms", "now, ms", "ratio", "quartiles", "turns", ""]
    summary = f"{len(lines)} rows, {len(worse)} slower by more than {100 * (SLOWER - 1):.0f} % or failed."
    return f"{summary}\n\n{table(head, lines)}\n", bool(worse)


def picture(rows: list[Row], path: Path) -> None:
    """Tokens per second and memory of a layer against the length, forward + backward, one thread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = dict(kind="layer", width=256, expansion=4, chunk=64, backward=True)
    chosen = [r for r in rows if base.items() <= r["case"].items() and r["threads"] == 1 and "median" in r]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for contender, colour in COLOURS.items():
        mine = sorted((r for r in chosen if r["contender"] == contender), key=lambda r: r["case"]["time"])
        if mine:
            times, speeds = [r["case"]["time"] for r in mine], [_tokens(r) for r in mine]
            axes[0].plot(times, speeds, color=colour, marker="o", label=contender)
            sized = [(r["case"]["time"], r["bytes"] / 2**20) for r in mine if r.get("bytes")]
            axes[1].plot([t for t, _ in sized], [b for _, b in sized], color=colour, marker="o")
    if chosen:
        operations = floating_operations(base | dict(time=1))
        roof = best_rate(rows, 1) / operations
        label = "the machine's best rate on the memory's operations"
        axes[0].axhline(roof, color="black", linestyle=":", label=label)
    for axis, name in zip(axes, ("tokens / s", "peak memory, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=name)
        axis.grid(alpha=0.3, which="both")
    figure.suptitle("One layer: width 256, expansion 4, chunk 64; forward + backward, 1 thread", fontsize=10)
    figure.legend(loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
