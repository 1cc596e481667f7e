"""A pretrained model reads a play that its window cannot hold, with a memory and without: `make demo`."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titans.data import encode_document, leading_tokens, load_corpus
from titans.experiments.runner import say
from titans.hf import GraftedForCausalLM
from titans.inspection import GraftInspection, GraftReading, draw_graft_inspection, write_page
from titans.inspection.graft_page import percent, place
from titans.inspection.grafted import PIECE_LENGTH, LossAt, joined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORPUS, PLAY, TITLE = "shakespeare", "king-lear", "King Lear"
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class BookDemo:
    """What was read and measured.

    tokens_in_book: of the whole book. seconds: of reading. state_bytes: held at the end. early_bytes: held
    when a window was full for the first time, None before. cache_bytes: what the base's own cache of all
    tokens would hold.
    """

    found: GraftInspection
    tokens_in_book: int
    seconds: float
    state_bytes: int
    early_bytes: int | None
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return len(self.found.ids) / self.seconds


def read_book(
    model: GraftedForCausalLM, tokenizer: PreTrainedTokenizerBase, text: bytes, seconds: float
) -> BookDemo:
    """Read a book from its beginning until its end or until the time is over, with and without the memory.

    Both arms come from one pass of the base. Reports to stderr how far it is.
    """
    ids = torch.tensor(encode_document(tokenizer, text, "the book").tolist())
    reader, parts, done, early_bytes = GraftReading(model, beginning=leading_tokens(tokenizer)), [], 0, None
    began = said = time.perf_counter()
    for piece in ids.split(PIECE_LENGTH):
        parts.append(reader.read(piece))
        done += len(piece)
        if early_bytes is None and done > 2 * model.config.window:
            early_bytes = reader.cache.nbytes()
        now = time.perf_counter()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said, rate = now, done / (now - began)
            left = min((len(ids) - done) / rate, began + seconds - now)
            so_far = joined(parts).whole()
            say(
                f"  {done:,} tokens · {rate:,.0f} tokens/s · {max(left, 0):.0f} s left · nats per token "
                f"{so_far.base:.3f} without, {so_far.loss:.3f} with the memory ({percent(so_far)})"
            )
        if now - began >= seconds:
            break
    taken = time.perf_counter() - began
    per_token = _cache_bytes_per_token(model)
    return BookDemo(joined(parts), len(ids), taken, reader.cache.nbytes(), early_bytes, done * per_token)


def _cache_bytes_per_token(model: GraftedForCausalLM) -> int:
    """Keys and values that the base itself keeps of a token."""
    window = model.initial_state(1).window
    sizes = [x.shape[1] * x.shape[3] * x.element_size() for x in (*window.keys, *window.values)]
    return sum(sizes)


def table(found: GraftInspection) -> str:
    """Losses by position, a line each."""
    parts = [(place(part), part) for part in found.by_position()] + [("all", found.whole())]
    lines = [f"{'nats per token':28} {'without':>8} {'with':>8} {'change':>8}"]
    lines += [f"{name:28} {part.base:8.3f} {part.loss:8.3f} {percent(part):>8}" for name, part in parts]
    return "\n".join(lines)


def verdict(demo: BookDemo, name: str, window: int) -> str:
    """Three lines: what was read, what the memory was worth, whichever way it fell, and what it cost."""
    found = demo.found
    last, whole = found.by_position()[-1], found.whole()
    read = f"{len(found.ids):,} of the {demo.tokens_in_book:,}"
    grown = demo.early_bytes is not None and demo.state_bytes > demo.early_bytes
    state = f"{demo.state_bytes / 1e6:.1f} MB"
    return "\n".join(
        [
            f"{name} read {read} tokens of {TITLE}, and saw at most {window} of them at a time: "
            f"{demo.tokens_per_second:,.0f} tokens/s.",
            f"A memory that learns while it reads, and was trained by nobody, {_changed(last)} on "
            f"{place(last)}, and {_changed(whole)} over all.",
            f"Its state {'grew to' if grown else 'stayed at'} {state}; the model's own cache of these tokens "
            f"would take {demo.cache_bytes / 1e6:,.0f} MB.",
        ]
    )


def _changed(part: LossAt) -> str:
    change = percent(part).lstrip("+−")
    return f"{'lowers' if part.gain >= 0 else 'raises'} the loss by {change}"


def show(
    model: GraftedForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, minutes: float, folder: Path
) -> None:
    """Read for about so many minutes, and write FOLDER/report.html, a picture next to it, and the numbers.

    Raises:
        ValueError, OSError: if the play cannot be loaded or the folder cannot be written.
    """
    (play,) = (document for document in load_corpus(CORPUS) if document.name == PLAY)
    window = model.config.window
    say(f"\n{name} reads {TITLE} ({len(play.data):,} bytes) through a window of {window} tokens")
    demo = read_book(model, tokenizer, play.data, 60 * minutes)
    lines = verdict(demo, name, window)
    say(f"\n{table(demo.found)}\n\n{lines}")
    folder.mkdir(parents=True, exist_ok=True)
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    title, about = f"{name} reads {TITLE}", f"{' '.join(lines.splitlines())} {machine}"
    write_page(folder / "report.html", demo.found, tokenizer, title=title, about=about)
    draw_graft_inspection(folder / "report.png", demo.found, title)
    numbers: dict[str, Any] = {
        "by_position": [asdict(part) for part in demo.found.by_position()],
        "whole": asdict(demo.found.whole()),
        "tokens_per_second": demo.tokens_per_second,
        "state_bytes": demo.state_bytes,
        "cache_bytes": demo.cache_bytes,
        "machine": machine,
    }
    (folder / "demo.json").write_text(json.dumps(numbers, indent=1))
    say(f"\nThe page, where every token has the colour of its gain: {folder / 'report.html'} ({machine})")
