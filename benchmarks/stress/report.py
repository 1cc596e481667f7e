"""Pages and files of what the stress test has found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from titans.experiments.results import encoded
from titans.experiments.tables import markdown
from titans.train.checkpoint import write_bytes

HEAD_DIM = 8
TOKENS = 4096
GROWTH_LIMIT = 100
DISTANCES = (256, 512, 1024, 2048, 4096)
GRADIENT_COLUMNS = [f"∂ at {d}" for d in DISTANCES]
PARTS = ("default", "features", "registered", "steps", "counter_examples", "search", "layer", "models")
Row = dict[str, Any]


def number(x: float) -> str:
    return f"{x:.3g}"


def fraction(row: Row, part: str) -> str:
    """The longest row seen, and how much of the bound that is."""
    seen = max(row[part])
    if f"bound_{part}" not in row:
        return number(seen)
    share = max(s / b for s, b in zip(row[part], row[f"bound_{part}"], strict=True))
    return f"{number(seen)} ({100 * share:.0f} %)"


def gradients(row: Row) -> list[str]:
    """The gradient at each distance."""
    return [number(row["gradients"][d]) if d in row["gradients"] else "–" for d in DISTANCES]


def growth_table(heading: str, names: list[list[str]], rows: list[Row]) -> str:
    """Growth, state and gradients of memories with these names, one for each row, in columns `heading`."""
    return markdown(
        [*heading.split(", "), "streams", "growth", "of a key", "weights", "momentum", *GRADIENT_COLUMNS],
        [
            [
                *name,
                str(r["cases"]),
                number(r["growth"]),
                number(r["growth_of_key"]),
                fraction(r, "weights"),
                fraction(r, "momentum"),
                *gradients(r),
            ]
            for name, r in zip(names, rows, strict=True)
        ],
    )


def fixed_streams(rows: list[Row], of: str) -> str:
    """A line about the largest growth."""
    largest = max(max(r["growth"], r["growth_of_key"]) for r in rows)
    return (
        f"- Fixed streams: {sum(r['cases'] for r in rows):,} on {of}, the largest growth of a disturbance is "
        f"{number(largest)} (limit {GROWTH_LIMIT}: {'kept' if largest < GROWTH_LIMIT else 'BROKEN'})."
    )


def report(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    defaults, features = found["default"], found["features"]
    broke = all(
        (r["growth"] > GROWTH_LIMIT or not r["finite"]) == r["breaks"] for r in found["counter_examples"]
    )
    searched = {
        depth: max(
            max(r["growth"], *r["repeated"])
            for r in found["search"]
            if r["step"] == 1 and r["depth"] == depth
        )
        for depth in (1, 2)
    }
    finite = all(r["finite"] for part in ("default", "features", "layer", "models") for r in found[part])
    bullets = [
        fixed_streams(defaults, "the default form"),
        fixed_streams(features, "memories of features and of two fast layers with sines"),
        f"- Forms that must break do, and the repaired one does not: {'yes' if broke else 'NO'}.",
        f"- NaN or infinity in the default form, a layer or a model: {'none' if finite else 'FOUND'}.",
        f"- A search by gradient ascent, at the default limits: "
        f"{', '.join(f'{number(x)}-fold at depth {depth}' for depth, x in searched.items())}. "
        "See below.",
    ]
    parts = [
        found["machine"],
        "\n".join(bullets),
        "## The default form at the limits of its gates",
        "Growth: the largest distance between the weights of two memories over the stream, divided by that "
        "of their beginnings (10⁻⁹), or by the change of the first key. Weights and momentum: the longest "
        "row seen, and how much that is of what `state_bound` allows. ∂ at T: the largest gradient of the "
        f"loss with respect to a key T tokens back. head_dim {HEAD_DIM}, expansion 2, float64. “learned”: "
        "with a base whose last layer is not empty.",
        growth_table(
            "depth, chunk",
            [[str(r["depth"]), str(r["chunk_size"]) + " learned" * (r["last"] > 0)] for r in defaults],
            defaults,
        ),
        "## Memories of features",
        f"One matrix on {4 * HEAD_DIM} slow features of a key, in the default form. The streams are of keys, "
        "among them keys that resemble each other; a change of the first key counts before the map, whose "
        "slope is a part of its growth. “any”: the streams are of the features themselves, which have any "
        "length up to 1. “two fast layers”: no slow features, but the default's two layers with a sine for "
        "SiLU.",
        growth_table("features, chunk", [[r["features"], str(r["chunk_size"])] for r in features], features),
        "## Registered rules and objectives",
        "Each in the default form with the usual other part, on a few of the streams (1,024 tokens, gates at "
        "their limits). “paper”: in the paper's form, with residual and LayerNorm, without momentum, and "
        "steps up to 0.1 / 16. An objective's threshold is that of an untrained layer, ln 2.",
        growth_table(
            "part, depth, chunk",
            [[r["of"], str(r["depth"]), str(r["chunk_size"])] for r in found["registered"]],
            found["registered"],
        ),
        "## Orthogonalised steps",
        "Atlas and LaCT, which move their weights once a chunk by a step with singular values near 1, times "
        "“rate”. Atlas is in the default form, and must break with Muon's quintic in place of the cubic. "
        "LaCT has the dot product and no offsets, and steps up to 0.05.",
        growth_table(
            "rule, chunk",
            [[r["of"], str(r["chunk_size"])] for r in found["steps"]],
            found["steps"],
        ),
        "## Forms that break",
        markdown(
            ["form", "breaks", "growth", "by", "longest row", *GRADIENT_COLUMNS],
            [
                [
                    r["form"],
                    "yes" if r["growth"] > GROWTH_LIMIT or not r["finite"] else "no",
                    number(r["growth"]),
                    r["worst"],
                    number(max(r["weights"])),
                    *gradients(r),
                ]
                for r in found["counter_examples"]
            ],
        ),
        "## A search for the worst stream",
        "Gradient ascent over keys, values and gates, head_dim 4, 12 streams at a time, on the growth of a "
        "disturbance of the weights; the worst stream is then repeated. The growth is the largest over time. "
        "Found is what the search ends on, not proof that nothing worse exists.",
        markdown(
            ["depth", "chunk", "× default step", "period", "growth found", "over 4096 tokens", "over 16384"],
            [
                [
                    str(r["depth"]),
                    str(r["chunk_size"]),
                    f"{r['step']:g}",
                    str(r["period"]),
                    f"{number(r['growth'])} in {r['tokens']}",
                    *(number(x) for x in r["repeated"]),
                ]
                for r in found["search"]
            ],
        ),
        "## A layer, its inputs scaled",
        markdown(
            ["norm", "dtype", "inputs ×", "finite", "largest output", "longest row", "largest gradient"],
            [
                [
                    "yes" if r["norm"] else "no",
                    r["dtype"],
                    f"{r['scale']:g}",
                    "yes" if r["finite"] else "NO",
                    number(r["output"]),
                    number(r["longest_row"]),
                    number(r["gradient"]),
                ]
                for r in found["layer"]
            ],
        ),
        "## Whole models, untrained",
        markdown(
            ["variant", "dtype", "stream", "tokens", "finite", "largest loss", "largest gradient"],
            [
                [
                    r["variant"],
                    r["dtype"],
                    r["stream"],
                    f"{r['tokens']:,}",
                    "yes" if r["finite"] else "NO",
                    "–" if r["worst_loss"] is None else number(r["worst_loss"]),
                    number(r["gradient"]),
                ]
                for r in found["models"]
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def write_results(folder: Path, found: dict[str, Any], text: str) -> None:
    """stress.md, and stress.json with a row in every line."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"part": part, **as_text(row)} for part in PARTS for row in found[part]]
    write_bytes(folder / "stress.md", text.encode())
    write_bytes(folder / "stress.json", encoded({"machine": found["machine"]}, rows, "rows"))


def as_text(value: Any) -> Any:
    """The same with strings for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def kept_results(folder: Path) -> dict[str, Any]:
    """What `write_results` has written."""

    def as_number(value: Any) -> Any:
        if isinstance(value, dict):
            return {int(k) if k.isdecimal() else k: as_number(item) for k, item in value.items()}
        if isinstance(value, list):
            return [as_number(item) for item in value]
        return float(value) if value in ("inf", "nan") else value

    content = json.loads((folder / "stress.json").read_text())
    found: dict[str, Any] = {"machine": content["machine"], **{part: [] for part in PARTS}}
    for row in content["rows"]:
        found[row.pop("part")].append(as_number(row))
    return found
