"""The metrics of a run: metrics.jsonl, one object per line, and a picture of its curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans.train.checkpoint import write_bytes, write_json, writing

_PENDING_FILE = "metrics_pending.json"


class MetricsLog:
    """Collects steps and writes them as lines of metrics.jsonl; `on_log` is called with every line.

    Of several processes, which all know the same figures, only one writes (`writes`) and calls.

    Training lines have kind "train", step, loss (nats per token, mean since the line before), learning_rate,
    grad_norm (before clipping), tokens_per_second (real tokens, without evaluations and checkpoints),
    loading (share of that time in which the step waited for its examples) and elapsed (seconds of the run,
    breaks before resuming not counted). Evaluation lines have kind "eval", step,
    loss, bits_per_byte and elapsed.
    """

    def __init__(
        self, path: Path, on_log: Callable[[dict[str, Any]], None] | None = None, writes: bool = True
    ) -> None:
        self.path = path
        self.writes = writes
        self.on_log = on_log
        self.grad_norm = self.learning_rate = 0.0
        self._losses: list[float] = []
        self._tokens = 0
        self._busy = self._waited = 0.0
        self._elapsed_before = 0.0
        self._started = self._resumed = time.perf_counter()

    def start(self, now: float) -> None:
        """Start the clock at `now`, in seconds of `time.perf_counter`."""
        self._started = self._resumed = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here does not count as training."""
        self._busy += time.perf_counter() - self._resumed
        yield
        self._resumed = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of the run so far."""
        return self._elapsed_before + time.perf_counter() - self._started

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time spent here is waiting for the examples of a step."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def add_step(self, loss: float, num_tokens: int) -> None:
        """Count one step."""
        self._losses.append(loss)
        self._tokens += num_tokens

    def log_training(self, step: int) -> None:
        """Write the line of the steps since the last one."""
        now = time.perf_counter()
        busy = self._busy + now - self._resumed
        line = {
            "kind": "train",
            "step": step,
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_second": round(self._tokens / max(busy, 1e-9), 1),
            "loading": round(self._waited / max(busy, 1e-9), 4),
            "elapsed": round(self.elapsed(), 3),
        }
        self._losses, self._tokens, self._busy, self._waited, self._resumed = [], 0, 0.0, 0.0, now
        self._write(line)

    def log_evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Write the line of an evaluation."""
        elapsed = round(self.elapsed(), 3)
        self._write(
            {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": bits_per_byte, "elapsed": elapsed}
        )

    def _write(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.on_log is not None:
            self.on_log(line)

    def save(self, folder: Path) -> None:
        """Write the steps that are not logged yet, and redraw the curves."""
        pending = {
            "losses": self._losses,
            "tokens": self._tokens,
            "busy": self._busy,
            "waited": self._waited,
            "elapsed": self.elapsed(),
        }
        write_json(folder / _PENDING_FILE, pending)
        draw_curves(read_metrics(self.path), self.path.with_name("curves.png"))

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; lines logged after it are dropped, because they will be logged again.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        step = int(folder.name.rpartition("-")[2])
        try:
            pending = json.loads((folder / _PENDING_FILE).read_text())
            self._losses, self._tokens = list(pending["losses"]), int(pending["tokens"])
            self._busy, self._elapsed_before = float(pending["busy"]), float(pending["elapsed"])
            self._waited = float(pending.get("waited", 0.0))  # of a time before it was measured
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{folder / _PENDING_FILE} is missing or damaged: delete {folder.name} to resume from an "
                "older checkpoint"
            ) from None
        if not self.writes:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl; a last one that a crash cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss and the held-out bits per byte over steps into a PNG; nothing of a single line."""
    training = [line for line in lines if line["kind"] == "train"]
    if len(training) < 2:
        return
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = [line for line in lines if line["kind"] == "eval"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([line["step"] for line in training], [line["loss"] for line in training], color="tab:blue")
    left.set(title="training", xlabel="step", ylabel="loss (nats per token)")
    right.plot(
        [line["step"] for line in evaluations],
        [line["bits_per_byte"] for line in evaluations],
        marker="o",
        color="tab:orange",
    )
    right.set(title="held-out text", xlabel="step", ylabel="bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
