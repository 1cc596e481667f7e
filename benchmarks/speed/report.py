"""Tables and a picture of what was timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
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
    return (16 if case["kind"] == "decode" else case["time"]) / row["median"]


def _megabytes(row: Row) -> str:
    return "–" if row.get("bytes") is None else f"{row['bytes'] / 2**20:.0f}"


def best_rate(rows: list[Row], threads: int) -> float:
    """The roofline: the best rate of any product, or of any scan, in operations per second."""
    return max((r["rate"] for r in rows if r["threads"] == threads and "rate" in r), default=float("nan"))


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
    """Everything as Markdown."""
    parts = [about, "### The machine\n\n" + _products(rows)]
    for title, kinds in (
        ("A layer with its projections, tokens/s", ("layer",)),
        ("A layer that reads on and on, tokens/s", ("stream",)),
        ("Whole models, tokens/s", ("train", "prefill", "decode")),
    ):
        if any(r["case"]["kind"] in kinds for r in rows):
            parts.append(f"### {title}\n\n{_others(rows, kinds)}")
    if any(r["case"]["kind"] == "scan" for r in rows):
        parts.insert(2, "### The memory alone (`memory_scan`)\n\n" + _scans(rows))
    return "\n\n".join(parts) + "\n"


def picture(rows: list[Row], path: Path) -> None:
    """Tokens per second and memory of a layer against the length, forward + backward, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max((r["threads"] for r in rows), default=1)
    chosen = [
        r
        for r in rows
        if r["case"]["kind"] == "layer" and r["case"]["backward"] and r["threads"] == threads
        if (r["case"]["width"], r["case"]["expansion"]) == (256, 4) and "median" in r
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for contender, colour in COLOURS.items():
        for chunk, style in ((16, "--"), (64, "-")):
            mine = sorted(
                (r["case"]["time"], r)
                for r in chosen
                if r["contender"] == contender and r["case"]["chunk"] == chunk
            )
            if not mine:
                continue
            times = [t for t, _ in mine]
            label = contender if not contender.startswith("titans,") else f"{contender}, chunk {chunk}"
            axes[0].plot(times, [_tokens(r) for _, r in mine], style, color=colour, marker="o", label=label)
            axes[1].plot(times, [r["bytes"] / 2**20 for _, r in mine], style, color=colour, marker="o")
    for axis, name in zip(axes, ("tokens / s", "peak memory, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].set_title(f"One layer, width 256, forward + backward, {threads} threads", fontsize=10)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
