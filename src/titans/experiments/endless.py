"""Does reading stay the same over ten million tokens: speed, memory, prediction and recall?

One session for each model reads ten million distinct bytes: the Bible, Shakespeare's plays, the sources of
Python's standard library. A play that was held out of training is left out here, too. Of the memories of 10⁵,
10⁶, 9 × 10⁶ (the books end 0.1 million later) and 10⁷ bytes two things are asked: how well is that play
predicted, and is a number recalled that was stated 64 KiB before?
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titans import zoo
from titans.data import hold_out, load_corpus
from titans.data.needles import TASKS, make_needles
from titans.evaluate.ask import answered, read
from titans.evaluate.perplexity import score
from titans.evaluate.throughput import peak_bytes
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request, Ticker
from titans.experiments.tables import markdown, percent
from titans.experiments.trained import chosen_models
from titans.stream import Session

MILLION = 1_000_000
EARLY = 100_000
MARKS = (EARLY, MILLION, 9 * MILLION, 10 * MILLION)
# Read and saved at a time, as `titans memorize --save-every` does: what that takes is known early then.
STRETCH = 50_000
PLAY_BYTES, BACK, NEEDLE_BYTES, ROWS = 65_536, 65_536, 128, 40
QUICK_BACK = 2_048


class Endless(Experiment):
    """A cell for each model: a row for every million tokens, and the answers at the marks."""

    name = "endless"
    title = "Ten million tokens"

    def cells(self, request: Request) -> list[Cell]:
        return [Cell(label, model) for label, model in chosen_models(request).items()]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        marks = (EARLY,) if request.quick else MARKS
        folder = request.work / "memories" / cell.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _, held_out = hold_out(load_corpus("shakespeare"), 0.1)
        text = distinct_bytes(marks[-1], without=held_out[0].data)
        # In a process of its own, whose peak nothing else raises.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        reader = context.Process(
            target=stream, args=(cell.settings, text, folder, torch.get_num_threads(), sender)
        )
        reader.start()
        sender.close()
        try:
            rows = receiver.recv()
        except EOFError:
            raise OSError(f"{cell.name}: the process that reads has died: out of memory?") from None
        finally:
            reader.join()
        play = held_out[0].data[:PLAY_BYTES]
        back = QUICK_BACK if request.quick else BACK
        asked = {mark: ask(cell.settings, folder / f"{mark}.memory", play, text, back) for mark in marks}
        return {"rows": rows, "asked": asked}

    def table(self, results: Results) -> str:
        rows = []
        for name, cell in sorted(results.cells.items()):
            for tokens, taken, seconds, peak, growth, state in cell["rows"]:
                at = cell["asked"].get(str(tokens))
                answers = [f"{at[0]:.3f}", percent(at[1], ROWS)] if at else ["", ""]
                speed = f"{taken / seconds:,.0f}"
                sizes = [f"{peak / 1e6:.0f}", f"{growth:+.2f} %", f"{state:,}"]
                rows.append([name, f"{tokens:,}", speed, *sizes, *answers])
        about = (
            "One reader, distinct bytes, a token is a byte. Peak: the largest resident memory of the "
            f"process, and its growth since the first {EARLY:,} tokens. Bits per byte of the first "
            f"{PLAY_BYTES:,} bytes of a play held out of training and of the stream, read next; numbers "
            f"stated next and asked for {BACK:,} bytes later, % of {ROWS} with 95 % interval."
        )
        head = ["model", "tokens", "tokens/s", "peak MB", "growth", "state bytes", "bits per byte"]
        return f"{about}\n\n{markdown([*head, 'recalled'], rows)}"


def distinct_bytes(count: int, without: bytes) -> bytes:
    """So many bytes of text, no part of it twice, and a play left out.

    Raises:
        ValueError: if this machine has fewer.
    """
    books = [document.data for name in ("bible", "shakespeare") for document in load_corpus(name)]
    books.remove(without)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    size = sum(map(len, books))
    for source in sources:
        if size >= count:
            break
        if "site-packages" not in source.parts and "dist-packages" not in source.parts:
            books.append(source.read_bytes())
            size += len(books[-1])
    if size < count:
        raise ValueError(f"there are {size:,} distinct bytes here, and {count:,} are to be read")
    return b"".join(books)[:count]


def stream(name: str, text: bytes, folder: Path, threads: int, sender: Any) -> None:
    """Read to the end of the text, keep the memory at every mark, and send a row for every million tokens:
    tokens so far, of them in this stretch, seconds, peak bytes, growth in %, bytes of state."""
    torch.set_num_threads(threads)
    model, tokenizer = zoo.load(name)
    session, early, ticker = Session(model, tokenizer), None, Ticker("bytes")
    rows = []
    while (begin := session.num_tokens) < len(text):
        # The first stretch is short: what the process needs is known then.
        end = EARLY if early is None else min(begin + MILLION - begin % MILLION, len(text))
        began = time.perf_counter()
        for at in range(begin, end, STRETCH):
            session.feed(
                text[at : min(at + STRETCH, end)],
                progress=lambda done, start=at: ticker(start + done, len(text)),
            )
            session.save(folder / "latest")
        seconds = time.perf_counter() - began
        if session.num_tokens in MARKS:
            (folder / "latest").rename(folder / f"{session.num_tokens}.memory")
        peak = peak_bytes(torch.device("cpu")) or 0
        early = early or peak
        growth = 100 * (peak / early - 1) if early else 0.0
        state = session.stats().state_bytes
        rows.append([session.num_tokens, session.num_tokens - begin, seconds, peak, growth, state])
    sender.send(rows)
    sender.close()


def ask(name: str, path: Path, play: bytes, book: bytes, back: int) -> tuple[float, int]:
    """Bits per byte of the play after a memory, and how many numbers are recalled `back` bytes later."""
    model, tokenizer = zoo.load(name)
    cache = Session.load(path, model, tokenizer).cache
    play_ids = np.frombuffer(play, np.uint8).astype(np.int64)
    bits = float(score(model, play_ids, cache.clone()).mean()) / math.log(2)
    needles = [make_needles(TASKS["number"], np.random.default_rng([7, row])) for row in range(ROWS)]
    rows = []
    for row, needle in enumerate(needles):
        statement = f" {needle.statements[0]} ".encode()
        begin = row * (len(book) - back) // ROWS
        rows.append(np.frombuffer(statement.rjust(NEEDLE_BYTES) + book[begin : begin + back], np.uint8))
    cache.batch_repeat_interleave(ROWS)
    _, cache = read(model, np.stack(rows), cache)
    questions, answers = ([getattr(n, part)[0] for n in needles] for part in ("questions", "answers"))
    return bits, int(answered(model, tokenizer, cache, questions, answers).sum())
