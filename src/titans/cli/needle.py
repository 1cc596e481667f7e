"""`titans eval needle`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions
from titans.cli.outputs import check_picture

if TYPE_CHECKING:
    from titans.evaluate.needle import NeedleCell

_UNITS = {"k": 1024, "K": 1024, "M": 1024**2, "m": 1024**2}


def _tokens(text: str) -> int:
    unit = _UNITS.get(text[-1:], 0)
    try:
        number = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        number = 0
    if number < 1 or number != int(number):
        raise UsageError(f"lengths: {text!r} is no number of tokens: write 4096, 4k or 1M")
    return int(number)


def _depth(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"depths: {text!r} is no number: give numbers from 0 to 1") from None


def _listed(metavar: str) -> tyro.constructors.PrimitiveConstructorSpec[tuple[str, ...]]:
    """Values with spaces or commas between them. What each means the command finds out: it can say more."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda texts: tuple(one for text in texts for one in text.split(",") if one),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    )


@dataclass(frozen=True)
class EvalNeedle(ModelOptions):
    """Hide a fact in a long text, ask for it at the end, and compare the answer that is generated.

    Example: titans eval needle titans-mac-tiny --task number --lengths 1k 4k 16k --plot needle.png

    The text is read once, at constant memory. Cells in brackets lie within attention's reach, where no memory
    is needed.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model, a graft or any causal model of transformers, or the name of one of the
    library's."""
    task: Literal["passkey", "number", "word", "uuid", "qa1", "qa2", "qa3"] = "passkey"
    """passkey: five digits in repeated filler. number, word, uuid: these in natural text. qa1, qa2,
    qa3: where is a person, a thing, and where was it before? Like bAbI's, in natural text."""
    lengths: Annotated[tuple[str, ...], _listed("LENGTH ...")] = ("1k", "4k", "16k")
    """Tokens from the beginning to the end of the question; 4k is 4096, 1M is 1048576."""
    depths: Annotated[tuple[str, ...], _listed("DEPTH ...")] = ("0", "0.25", "0.5", "0.75", "1")
    """Where the needle stands: 0 the beginning, 1 the end. Not used with several needles."""
    haystack: str = "bible"
    """Corpus to insert it in (a passkey: filler): a text file, a folder, excerpt, shakespeare, bible."""
    hold_out: float = 0.0
    """Take only the documents that `titans train --hold-out` with the same number keeps from training."""
    samples: int = 8
    """Texts for each length and depth."""
    keys: int = 1
    """Names about which a fact is stated; all but those asked for are distractors."""
    values: int = 1
    """Values of each name; all have to be recalled."""
    questions: int = 1
    """Names asked for; all have to be right."""
    batch_size: int = 8
    """Texts read side by side."""
    seed: int = 0
    """Seed of names, values and places."""
    plot: Path | None = None
    """Draw the table as a picture into this file."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Evaluate, reporting to stderr."""
        for name in ("samples", "keys", "values", "questions", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: give a whole number of at least 1")
        if not self.lengths:
            raise UsageError("lengths: none given; name at least one")
        lengths = [_tokens(text) for text in self.lengths]
        depths = [_depth(text) for text in self.depths]
        check_picture("plot", self.plot, [Path(self.haystack)])
        model, tokenizer = self.open_model(self.checkpoint)
        from titans.cli.progress import ReadingProgress
        from titans.data import hold_out, load_corpus
        from titans.data.needles import TASKS
        from titans.evaluate.needle import cells_of, needle_table

        haystack = None
        if TASKS[self.task].haystack == "text":
            documents = load_corpus(self.haystack)
            if self.hold_out:
                documents = hold_out(documents, self.hold_out)[1]
            haystack = "\n".join(document.data.decode("utf-8", "replace") for document in documents)
        planned = cells_of(TASKS[self.task], lengths, depths, self.keys, self.values)
        with ReadingProgress(self.samples * sum(length for length, _ in planned)) as progress:
            cells = needle_table(
                model,
                tokenizer,
                self.task,
                lengths,
                depths,
                haystack=haystack,
                samples=self.samples,
                batch_size=self.batch_size,
                num_keys=self.keys,
                num_values=self.values,
                num_questions=self.questions,
                seed=self.seed,
                progress=lambda done, total: progress.update(done, done, "reading"),
            )
        _show(self.task, cells)
        if self.plot is not None:
            from titans.evaluate.heat_map import draw_heat_maps

            draw_heat_maps(self.plot, {self.task: cells}, str(self.checkpoint))
        if self.json:
            result = {"checkpoint": str(self.checkpoint), "task": self.task, "cells": [*map(asdict, cells)]}
            print(json.dumps(result))
        return 0


def _show(task: str, cells: list[NeedleCell]) -> None:
    from rich.console import Console
    from rich.table import Table

    depths = list(dict.fromkeys(cell.depth for cell in cells))
    table = Table(title=f"{task}: answers exact, % with 95 % interval; {cells[0].samples} texts a cell")
    table.add_column("tokens", justify="right")
    table.add_column("bytes", justify="right")
    for depth in depths:
        table.add_column("anywhere" if depth is None else f"depth {depth:g}", justify="right", no_wrap=True)
    for length in dict.fromkeys(cell.length for cell in cells):
        row = [cell for cell in cells if cell.length == length]
        shown = [f"{100 * c.accuracy:.0f} ({100 * c.low:.0f}–{100 * c.high:.0f})" for c in row]
        marked = [text if c.beyond_attention else f"[{text}]" for text, c in zip(shown, row, strict=True)]
        table.add_row(f"{length:,}", f"{row[0].num_bytes:,}", *(text.replace("[", r"\[") for text in marked))
    table.caption = "in brackets: within attention's reach"
    Console(stderr=True).print(table)
