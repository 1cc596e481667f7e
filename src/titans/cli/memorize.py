"""`titans memorize`."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions, open_session
from titans.cli.outputs import check_output, is_memory
from titans.cli.terminal import report


@dataclass(frozen=True)
class Memorize(ModelOptions):
    """Read files into a memory, in the order given, and save it.

    Example: titans memorize titans-lmm-tiny book.txt notes/ paper.pdf -o book.memory

    Files may have any length: memory use does not grow. A reading that was cut off, by Ctrl-C or otherwise,
    goes on with the same command and --resume. A memory file may reveal the text it was made from.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model, a graft or any causal model of transformers, or the name of one of the
    library's."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Texts, PDF files and folders of them to read, one after the other."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write the memory to."""
    memory: Path | None = None
    """Go on from this memory instead of an empty one."""
    save_every: int = 1_000_000
    """Write the memory after about so many tokens, and at the end."""
    resume: bool = False
    """Go on from where a reading of the same files into the same output was cut off."""
    json: bool = False
    """Print a summary as one JSON object."""

    def run(self) -> int:
        """Read and save, reporting to stderr."""
        check_output("output", self.output, is_memory, self.files)
        if not self.files:
            raise UsageError("files: none given; name the texts to read before -o")
        if self.save_every < 1:
            raise UsageError(f"save_every={self.save_every}: give a whole number of at least 1")
        if self.resume and self.memory:
            raise UsageError("resume goes on from the output: leave memory out")
        from titans.stream.reading.reading import is_unfinished
        from titans.stream.reading.sources import find_sources

        if not self.resume and is_unfinished(self.output):
            raise UsageError(
                f"output={str(self.output)!r} holds a reading that was cut off: go on with --resume, or name "
                "another file"
            )
        with tempfile.TemporaryDirectory(prefix="titans-") as scratch:
            return self._read(find_sources(self.files, Path(scratch)))

    def _read(self, sources: list[Any]) -> int:
        from titans.cli.progress import ReadingProgress
        from titans.stream.reading.reading import Reading

        model, tokenizer = self.open_model(self.checkpoint)
        session = open_session(model, tokenizer, self.output if self.resume else self.memory)
        reading, began = Reading(session, tokenizer, sources), time.perf_counter()
        if self.resume:
            reading.resume(self.output)
        before = saved = reading.tokens

        def save_now_and_then() -> None:
            nonlocal saved
            if reading.tokens - saved >= self.save_every:
                self._save(reading, saved)
                saved = reading.tokens

        total = sum(source.num_bytes for source in sources)
        try:
            with ReadingProgress(total) as progress:
                reading.read(
                    lambda done, name: progress.update(done, reading.tokens - before, name), save_now_and_then
                )
        except KeyboardInterrupt:
            if not reading.tokens:
                raise KeyboardInterrupt("interrupted before anything was read; nothing is saved") from None
            reading.save(self.output)
            raise KeyboardInterrupt(
                f"interrupted; {self.output} holds the {reading.tokens:,} tokens read until then: go on with "
                "--resume"
            ) from None
        seconds = time.perf_counter() - began
        self._save(reading, saved, complete=True)
        summary = {
            "output": str(self.output),
            "tokens": reading.tokens,
            "tokens_in_memory": session.num_tokens,
            "bytes": total,
            "seconds": round(seconds, 3),
            "tokens_per_second": round((reading.tokens - before) / seconds, 1),
            "state_bytes": session.stats().state_bytes,
            **reading.survey.summary(),
        }
        _report(summary)
        if self.json:
            print(json.dumps(summary))
        return 0

    def _save(self, reading: Any, saved: int, complete: bool = False) -> None:
        try:
            reading.save(self.output, complete)
        except OSError as error:
            left = f"it still holds the first {saved:,} tokens; make room and go on with --resume"
            raise OSError(f"{error}: {left if saved else 'make room and start again'}") from None


def _report(summary: dict[str, Any]) -> None:
    lines = [
        f"{summary['output']} holds {summary['tokens_in_memory']:,} tokens in "
        f"{summary['state_bytes']:,} bytes; {summary['tokens_per_second']:,.0f} tokens/s"
    ]
    if summary["mean_surprise"] is not None:
        lines.append(f"surprise: mean {summary['mean_surprise']:.4f}")
    if peak := summary["peak"]:
        lines.append(
            f"  peak {peak['surprise']:.4f} in {peak['file']} at byte {peak['offset']:,}: {peak['excerpt']}"
        )
    report("\n".join(lines))
