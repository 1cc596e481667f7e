"""`titans inspect`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from titans.cli.errors import UsageError
from titans.cli.outputs import check_page_and_picture
from titans.cli.terminal import report
from titans.zoo.checkpoint import load_titans

# Arrays of one text are held in memory, some 200 bytes a token.
_MOST_BYTES = 4_000_000


@dataclass(frozen=True)
class Inspect:
    """Read a text and show what surprised the memory, what it holds, and where it helped.

    Example: titans inspect titans-lmm-tiny book.txt -o book.html

    Writes a page that needs no network (the whole text is in it), and a picture of the same name next to it.
    Every passage is also read with the memory of another text and with none, to see what memory did for it.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a model, as `titans train` leaves it, or the name of one that comes with the library."""
    file: tyro.conf.Positional[Path]
    """Text or PDF to read."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("inspection.html")
    """Page to write; the picture is next to it."""
    memory: Path | None = None
    """Go on from this memory instead of an empty one."""
    another: str = "bible"
    """The other text: a file, a folder, or a built-in name such as shakespeare or excerpt."""
    most: int = _MOST_BYTES
    """Read at most so many bytes of the file."""
    json: bool = False
    """Print all arrays as one JSON object."""

    def run(self) -> int:
        """Read and write, reporting to stderr."""
        picture = self.output.with_suffix(".png")
        inputs = [self.file, Path(self.another), *([self.memory] if self.memory else [])]
        check_page_and_picture("output", self.output, picture, inputs)
        if self.most < 2:
            raise UsageError(f"most={self.most}: give a whole number of at least 2")
        from titans.cli.progress import ReadingProgress
        from titans.data import encode_document, load_corpus
        from titans.inspection import draw_inspection, inspect_text, write_page
        from titans.stream import Session
        from titans.stream.reading.sources import find_sources

        with tempfile.TemporaryDirectory(prefix="titans-") as scratch:
            if self.file.is_dir():
                raise ValueError(f"file={str(self.file)!r} is a folder: give one text")
            (source,) = find_sources([self.file], Path(scratch))
            with source.text.open("rb") as file:
                content = file.read(self.most)
        other = b"\n".join(document.data for document in load_corpus(self.another))[: len(content)]
        model, tokenizer = load_titans(self.checkpoint)
        cache = Session.load(self.memory, model, tokenizer).cache if self.memory else None
        with ReadingProgress(len(content)) as progress:
            found = inspect_text(
                model,
                encode_document(tokenizer, content, source.name),
                encode_document(tokenizer, other, self.another),
                cache=cache,
                progress=lambda done, total: progress.update(
                    done / total * len(content), done, self.file.name
                ),
            )
        title = f"What {self.checkpoint.name} remembers of {self.file.name}"
        size = f"{model.config.variant}, {model.num_parameters():,} parameters"
        about = f"{size}; the other text: {self.another}"
        write_page(self.output, found, tokenizer, title=title, about=about)
        draw_inspection(picture, found, title)
        report(f"{self.output}, {self.output.stat().st_size:,} bytes; {picture}")
        if self.json:
            print(json.dumps(found.to_json()))
        return 0
