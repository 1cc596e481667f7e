"""The demo's page: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from titans.experiments.hidden_fact import HiddenFact
from titans.experiments.recollection import PIECE_LENGTH, Recollection

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.2rem;margin-top:2.2rem}
.sub,.note{color:#5b5b5b} .note{font-size:.9rem}
table{border-collapse:collapse;margin:.8rem 0}
td,th{padding:.3rem .9rem;text-align:left;border-bottom:1px solid #ddd}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
pre,.heat{background:#faf8f4;border:1px solid #e6e1d8;border-radius:6px;padding:1rem;
font:14px/1.6 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
img{max-width:100%}
.key{display:inline-block;width:9rem;height:.8rem;border-radius:3px;vertical-align:middle;
background:linear-gradient(90deg,#faf8f4,#f6b89a,#c8391f)}
"""


@dataclass(frozen=True)
class TrainedModel:
    """One trained model's row in the report; losses and evaluations are (step, bits per byte)."""

    name: str
    num_parameters: int
    num_bytes: int
    bits_per_byte: float
    speed: float
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class DemoResult:
    """Everything the report shows."""

    setting: str
    machine: str
    models: tuple[TrainedModel, ...]
    training_note: str
    recollection: Recollection
    recollection_note: str
    verdict: str
    passage: bytes
    surprise: np.ndarray
    sample: str
    temperature: float
    hidden: HiddenFact
    hidden_note: str


def write_report(result: DemoResult, path: Path) -> None:
    """Write the page; it needs no network and no other file."""
    sections = [
        f"<h1>A memory that learns while it reads</h1><p class=sub>{html.escape(result.setting)}</p>",
        "<h2>Training</h2>",
        _picture(_training_curves(result)),
        _table(
            ["model", "parameters", "bytes read", "held-out bits per byte", "bytes per second"],
            [
                [
                    m.name,
                    f"{m.num_parameters:,}",
                    f"{m.num_bytes:,}",
                    f"{m.bits_per_byte:.3f}",
                    f"{m.speed:,.0f}",
                ]
                for m in result.models
            ],
        ),
        f"<p class=note>{html.escape(result.training_note)}</p>",
        "<h2>What the memory is worth</h2>",
        f"<p>{html.escape(result.recollection_note)}</p>",
        _table(
            ["read into memory before", "bits per byte", "against nothing"],
            [
                [arm, f"{bits:.4f}", f"{bits - result.recollection.bits_per_byte[-1]:+.4f}"]
                for arm, bits in zip(result.recollection.arms, result.recollection.bits_per_byte, strict=True)
            ],
        ),
        f"<p>{html.escape(result.verdict)}</p>",
        _picture(_recollection_curves(result)),
        "<h2>What surprised it</h2>",
        "<p>‖M(k) − v‖² before each byte is written: how wrong the memory was about it, over layers and "
        "heads, relative to each one's mean. <span class=key></span> little to much</p>",
        _heat(result.passage, result.surprise),
        "<h2>A fact, and how long it lasts</h2>",
        *_asked(result.hidden),
        f"<p class=note>{html.escape(result.hidden_note)}</p>",
        "<h2>A sample</h2>",
        f"<p class=note>After reading the held-out text, at temperature {result.temperature}:</p>",
        f"<pre>{html.escape(result.sample)}</pre>",
        f"<p class=note>{html.escape(result.machine)}</p>",
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Titans demo</title>"
        f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>"
    )
    temporary = path.with_suffix(".part")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(kind: str, row: list[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if i else ''}>{html.escape(cell)}</{kind}>" for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _asked(hidden: HiddenFact) -> list[str]:
    rows = [["stated", hidden.statement], ["asked", hidden.question]]
    for reply in hidden.replies:
        verdict = "right" if hidden.is_right(reply) else f"wrong, it is {hidden.answer}"
        rows.append([f"{reply.num_bytes:,} bytes later", f"{reply.answer.strip()} ({verdict})"])
    rows.append(["read in", f"{hidden.seconds:.0f} s"])
    rows.append(["state", f"{hidden.state_bytes:,} bytes"])
    body = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return [f"<table>{body}</table>"]


def _heat(passage: bytes, surprise: np.ndarray) -> str:
    low, high = np.quantile(surprise, [0.1, 0.98])
    level = np.clip((surprise - low) / max(high - low, 1e-12), 0, 1)
    parts = []
    begin = 0
    for character in passage.decode("utf-8", "replace"):
        end = begin + len(character.encode())
        colour, raw = _colour(float(level[begin:end].mean())), surprise[begin:end].mean()
        parts.append(f'<span style="background:{colour}" title="{raw:.2f}">{html.escape(character)}</span>')
        begin = end
    return f"<div class=heat>{''.join(parts)}</div>"


def _colour(level: float) -> str:
    stops = np.array([[250, 248, 244], [246, 184, 154], [200, 57, 31]], float)
    place = level * 2
    low = min(int(place), 1)
    red, green, blue = (stops[low] + (stops[low + 1] - stops[low]) * (place - low)).astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _training_curves(result: DemoResult) -> Figure:
    figure, axes = _figure()
    for model, colour in zip(result.models, ("#c8391f", "#35618f"), strict=True):
        steps, losses = zip(*model.losses, strict=True)
        axes.plot(steps, losses, color=colour, alpha=0.8, label=f"{model.name}, training")
        if model.evaluations:
            steps, held_out = zip(*model.evaluations, strict=True)
            axes.plot(steps, held_out, "o--", color=colour, markersize=4, label=f"{model.name}, held out")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_ylim(top=min(axes.get_ylim()[1], 5.5))
    axes.legend(frameon=False)
    return figure


def _recollection_curves(result: DemoResult) -> Figure:
    figure, axes = _figure()
    found = result.recollection
    nothing = np.cumsum(found.curve[-1])
    bytes_read = (np.arange(found.curve.shape[1]) + 1) * PIECE_LENGTH
    for arm, curve in zip(found.arms[:-1], found.curve[:-1], strict=True):
        axes.plot(bytes_read, (nothing - np.cumsum(curve)) * PIECE_LENGTH, label=arm)
    axes.axhline(0, color="#888", linewidth=0.8)
    axes.set(xlabel="bytes of the second half", ylabel="bits saved so far\nagainst nothing")
    axes.legend(frameon=False)
    return figure
