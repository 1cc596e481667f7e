"""`titans eval perplexity`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions

if TYPE_CHECKING:
    from titans.evaluate import Perplexity, PositionLoss


@dataclass(frozen=True)
class EvalPerplexity(ModelOptions):
    """Bits per byte of documents read from beginning to end, overall and by position in the document.

    Example: titans eval perplexity runs/tempest --data shakespeare --hold-out 0.1 --freeze-memory
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model, a graft or any causal model of transformers, or the name of one of the
    library's."""
    data: tuple[str, ...]
    """Corpora, each a text file, a folder of them, hf:NAME, or a built-in name: excerpt, shakespeare,
    bible."""
    hold_out: float = 0.0
    """Take only the documents that `titans train --hold-out` with the same number keeps away from
    training."""
    freeze_memory: bool = False
    """Measure once more with a memory that writes nothing, and show the difference."""
    context_length: int | None = None
    """Forget everything whenever so many tokens have been read; by default never within a document."""
    batch_size: int = 8
    """Documents read side by side."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Evaluate, reporting to stderr."""
        if not self.data:
            raise UsageError("data: none given; name at least one corpus")
        for name in ("batch_size", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: give a whole number of at least 1")
        if not 0 <= self.hold_out < 1:
            raise UsageError(f"hold_out={self.hold_out}: give a fraction from 0 up to, but not including, 1")
        model, tokenizer = self.open_model(self.checkpoint)
        if self.freeze_memory and not getattr(model.config, "has_memory", False):
            kind = getattr(model.config, "variant", model.config.model_type)
            raise UsageError(f"freeze_memory with a model {kind!r}: it has no memory; leave the option out")
        from titans.cli.progress import ReadingProgress
        from titans.data import encode_document, hold_out, leading_tokens, load_corpus
        from titans.evaluate import bits_per_byte

        documents = [document for source in self.data for document in load_corpus(source)]
        if self.hold_out:
            documents = hold_out(documents, self.hold_out)[1]
        encoded = [(encode_document(tokenizer, d.data, d.name), len(d.data)) for d in documents]
        beginning = leading_tokens(tokenizer)
        total = sum(max(len(ids) - (not beginning), 0) for ids, _ in encoded)

        def measure(freeze: bool) -> Perplexity:
            with ReadingProgress(total) as progress:
                return bits_per_byte(
                    model,
                    encoded,
                    batch_size=self.batch_size,
                    context_length=self.context_length,
                    freeze_memory=freeze,
                    beginning=beginning,
                    progress=lambda done, total: progress.update(
                        done, done, "frozen" if freeze else "reading"
                    ),
                )

        normal = measure(False)
        frozen = measure(True) if self.freeze_memory else None
        _show(len(documents), normal, frozen)
        if self.json:
            result = {"checkpoint": str(self.checkpoint), "documents": len(documents), **asdict(normal)}
            if frozen is not None:
                result |= {"frozen": asdict(frozen), "gain": frozen.bits_per_byte - normal.bits_per_byte}
            print(json.dumps(result))
        return 0


def _show(documents: int, normal: Perplexity, frozen: Perplexity | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{normal.tokens:,} tokens predicted in {documents} document(s)")
    columns = ["position", "tokens", "bits/byte", "nats/token"]
    columns += ["frozen", "gain"] if frozen is not None else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    def add(place: str, now: Perplexity | PositionLoss, without: Perplexity | PositionLoss | None) -> None:
        cells = [place, f"{now.tokens:,}", f"{now.bits_per_byte:.4f}", f"{now.nats_per_token:.4f}"]
        if without is not None:
            cells += [f"{without.bits_per_byte:.4f}", f"{without.bits_per_byte - now.bits_per_byte:+.4f}"]
        table.add_row(*cells)

    for index, part in enumerate(normal.by_position):
        end = "" if part.end is None else f"{part.end - 1:,}"
        add(f"{part.begin:,}–{end}", part, None if frozen is None else frozen.by_position[index])
    table.add_section()
    add("all", normal, frozen)
    if frozen is not None:
        table.caption = "frozen: bits/byte with a memory that writes nothing; gain: what writing saves"
    Console(stderr=True).print(table)
