"""`titans inspect`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions
from titans.cli.outputs import check_page_and_picture
from titans.cli.terminal import report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.hf import GraftedForCausalLM, TitansForCausalLM
    from titans.inspection import GraftInspection, Inspection

# Arrays of one text are held in memory, some 200 bytes a token.
_MOST_BYTES = 4_000_000


@dataclass(frozen=True)
class Inspect(ModelOptions):
    """Read a text and show where a memory helped, token by token.

    Example: titans inspect titans-lmm-tiny book.txt -o book.html

    Writes a page that needs no network (the whole text is in it), and a picture of the same name next to it.
    Of a Titans model it also shows what surprised the memory and what it holds, and reads every passage with
    the memory of another text and with none. A graft is compared with its base in the same window.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model or a graft, or the name of one of the library's; with --graft any model's."""
    file: tyro.conf.Positional[Path]
    """Text or PDF to read."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("inspection.html")
    """Page to write; the picture is next to it."""
    memory: Path | None = None
    """Go on from this memory instead of an empty one; not for a graft with residual branches or LoRA."""
    another: str = "bible"
    """The other text for a Titans model: a file, a folder, or a built-in name such as shakespeare."""
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
        from titans.hf import GraftedForCausalLM, TitansForCausalLM
        from titans.inspection import GraftInspection, draw_graft_inspection, draw_inspection, write_page

        name, content = self._content()
        model, tokenizer = self.open_model(self.checkpoint)
        title = f"What {self.checkpoint.name} remembers of {self.file.name}"
        if isinstance(model, GraftedForCausalLM):
            found, about = self._of_graft(model, tokenizer, name, content)
            title = f"What a memory gains {self.checkpoint.name} in prediction of {self.file.name}"
        elif isinstance(model, TitansForCausalLM):
            found, about = self._of_memory(model, tokenizer, name, content)
        else:
            raise ValueError(
                f"checkpoint={str(self.checkpoint)!r} is a {type(model).__name__} without a memory: give a "
                "Titans model or a graft, or --graft"
            )
        write_page(self.output, found, tokenizer, title=title, about=about)
        if isinstance(found, GraftInspection):
            draw_graft_inspection(picture, found, title)
        else:
            draw_inspection(picture, found, title)
        report(f"{self.output}, {self.output.stat().st_size:,} bytes; {picture}")
        if self.json:
            print(json.dumps(found.to_json()))
        return 0

    def _content(self) -> tuple[str, bytes]:
        """Name and text of the file."""
        from titans.stream.reading.sources import find_sources

        with tempfile.TemporaryDirectory(prefix="titans-") as scratch:
            if self.file.is_dir():
                raise ValueError(f"file={str(self.file)!r} is a folder: give one text")
            (source,) = find_sources([self.file], Path(scratch))
            with source.text.open("rb") as file:
                return source.name, file.read(self.most)

    def _of_memory(
        self, model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes
    ) -> tuple[Inspection, str]:
        """An inspection, and a line about it."""
        from titans.cli.progress import ReadingProgress
        from titans.data import encode_document, load_corpus
        from titans.inspection import inspect_text

        other = b"\n".join(document.data for document in load_corpus(self.another))[: len(content)]
        with ReadingProgress(len(content)) as progress:
            found = inspect_text(
                model,
                encode_document(tokenizer, content, name),
                encode_document(tokenizer, other, self.another),
                cache=self._cache(model, tokenizer),
                progress=lambda done, total: progress.update(
                    done / total * len(content), done, self.file.name
                ),
            )
        size = f"{model.config.variant}, {model.num_parameters():,} parameters"
        return found, f"{size}; the other text: {self.another}"

    def _of_graft(
        self, model: GraftedForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes
    ) -> tuple[GraftInspection, str]:
        """An inspection, and a line about it."""
        from titans.cli.progress import ReadingProgress
        from titans.data import encode_document, leading_tokens
        from titans.inspection import inspect_graft
        from titans.inspection.grafted import BASE_UNKNOWN

        if self.memory and model.config.changes_base:
            raise ValueError(
                f"memory={str(self.memory)!r}: {BASE_UNKNOWN}: leave --memory out, and give one file that "
                "begins with what it has read"
            )
        cache = self._cache(model, tokenizer)
        ids = encode_document(tokenizer, content, name)
        with ReadingProgress(len(ids)) as progress:
            found = inspect_graft(
                model,
                ids,
                cache=cache,
                beginning=() if cache else leading_tokens(tokenizer),
                progress=lambda done, total: progress.update(done, done, self.file.name),
            )
        size = f"{type(model.base).__name__}, {model.num_parameters():,} parameters"
        return (
            found,
            f"{size}, window of {model.config.window} tokens; compared with the same without its memory",
        )

    def _cache(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What the memory that is given has read, or None."""
        from titans.stream import Session

        return Session.load(self.memory, model, tokenizer).cache if self.memory else None
