"""`titans demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titans.cli.errors import UsageError
from titans.cli.outputs import check_output, is_page


@dataclass(frozen=True)
class Demo:
    """Train a small model on Shakespeare and a transformer with it, and show what its memory is worth.

    Example: titans demo --steps 320 --output demo

    Writes report.html and demo.json, and the two models, into the output folder. Takes some minutes.
    """

    steps: int = 320
    """Training steps of each model."""
    output: Path = Path("demo")
    """Folder to write."""

    def run(self) -> int:
        """Run the demo, reporting to stderr."""
        if self.steps < 1:
            raise UsageError(f"steps={self.steps}: give a whole number of at least 1")
        if self.output.is_dir():
            check_output("output", self.output / "report.html", is_page)
        from titans.experiments.demo import show

        show(self.steps, self.output)
        return 0
