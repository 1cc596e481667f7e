"""Does reading cost the same after ten million tokens as after a hundred thousand, and is it worth as much?

    python benchmarks/endless.py                                    # every model of the zoo, what is missing
    python benchmarks/endless.py --models titans-lmm-tiny --most 2000000

One reader a model takes in ten million distinct bytes: the Bible, Shakespeare's plays, the sources of
Python's standard library. A play that was held out of training is left out here, too. The memory is kept at
every million, and the same command goes on from there. Of the memories of 10⁵, 10⁶, 9 × 10⁶ (the books end
0.1 million later) and 10⁷ bytes two things are asked: how well is that play predicted, and is a number found
that was told 64 KiB before? Everything is kept in benchmarks/results/endless.json.
"""

from __future__ import annotations

import argparse
import datetime
import math
import multiprocessing
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import Found, known

from titans import Session, zoo
from titans.cli.progress import ReadingProgress
from titans.data import hold_out, load_corpus
from titans.data.needles import TASKS, make_needles
from titans.evaluate.ask import answered, read
from titans.evaluate.needle import wilson
from titans.evaluate.perplexity import score
from titans.evaluate.throughput import peak_bytes

RESULTS = Path(__file__).parent / "results" / "endless.json"
REPORT = RESULTS.with_suffix(".md")
MILLION = 1_000_000
EARLY = 100_000
MARKS = (EARLY, MILLION, 9 * MILLION, 10 * MILLION)
# Read and saved at a time, as `titans memorize --save-every` does: what that takes is known early then.
STRETCH = 50_000
PLAY_BYTES, BACK, NEEDLE_BYTES, ROWS = 65_536, 65_536, 128, 40


def distinct_bytes(count: int, without: bytes) -> bytes:
    """So many bytes of text, no part of it twice, and a play left out."""
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
        raise SystemExit(f"there are {size:,} distinct bytes here: give --most of at most that")
    return b"".join(books)[:count]


def stream(name: str, text: bytes, folder: Path, threads: int) -> None:
    """Read on to the end of the text, keeping the memory and a line for every stretch."""
    torch.set_num_threads(threads)
    model, tokenizer = zoo.load(name)
    session, early = Session(model, tokenizer), None
    saved = sorted(folder.glob("*.memory"), key=lambda path: int(path.stem))
    if saved:
        session = Session.load(saved[-1], model, tokenizer)
    with ReadingProgress(len(text)) as progress:
        while (begin := session.num_tokens) < len(text):
            # The first stretch of a process is short: what it needs is known then.
            size = EARLY if early is None else MILLION - begin % MILLION
            began = time.perf_counter()
            for at in range(begin, min(begin + size, len(text)), STRETCH):
                session.feed(
                    text[at : min(at + STRETCH, begin + size)],
                    progress=lambda done, start=at: progress.update(start + done, start + done, name),
                )
                session.save(folder / "latest")
            seconds = time.perf_counter() - began
            (folder / "latest").rename(folder / f"{session.num_tokens}.memory")
            early = early or peak_bytes(torch.device("cpu"))
            with known(RESULTS) as found:
                found[f"{name}, read, {session.num_tokens}"] = {
                    "tokens": session.num_tokens - begin,
                    "seconds": seconds,
                    "peak": peak_bytes(torch.device("cpu")),
                    "early_peak": early,
                    "state_bytes": session.stats().state_bytes,
                    "date": str(datetime.date.today()),
                    "machine": f"{platform.machine()}, torch {torch.__version__}",
                }


def ask(name: str, mark: int, folder: Path, play: bytes, book: bytes) -> None:
    """What the memory at a mark is worth, unless it is known or was not reached."""
    path, key = folder / f"{mark}.memory", f"{name}, asked, {mark}"
    with known(RESULTS) as found:
        if key in found or not path.exists():
            return
    model, tokenizer = zoo.load(name)
    print(f"{name}: asking the memory of {mark:,} tokens", file=sys.stderr)
    cache = Session.load(path, model, tokenizer).cache
    play_ids = np.frombuffer(play, np.uint8).astype(np.int64)
    bits = float(score(model, play_ids, cache.clone()).mean()) / math.log(2)
    needles = [make_needles(TASKS["number"], np.random.default_rng([7, row])) for row in range(ROWS)]
    rows = []
    for row, needle in enumerate(needles):
        told = f" {needle.statements[0]} ".encode()
        begin = row * (len(book) - BACK) // ROWS
        rows.append(np.frombuffer(told.rjust(NEEDLE_BYTES) + book[begin : begin + BACK], np.uint8))
    cache.batch_repeat_interleave(ROWS)
    _, cache = read(model, np.stack(rows), cache)
    right = answered(
        model, tokenizer, cache, [n.questions[0] for n in needles], [n.answers[0] for n in needles]
    )
    with known(RESULTS) as found:
        found[key] = {"bits_per_byte": bits, "right": int(right.sum()), "rows": ROWS}


def speed(at: dict[str, Any]) -> float:
    """Tokens a second in the stretch that ends here."""
    return at["tokens"] / at["seconds"]


def growth(at: dict[str, Any]) -> float:
    """By how many % the peak has grown since the first stretch of the same process."""
    return 100 * (at["peak"] / at["early_peak"] - 1)


def report() -> None:
    """A table for each model that has been read with."""
    with known(RESULTS) as found:
        found = dict(found)
    lines = [
        "# Ten million tokens",
        "",
        "`python benchmarks/endless.py`: one reader, distinct bytes, a token is a byte. Peak: what the "
        f"process had resident at most, and how much more than after its first {EARLY:,} tokens. Bits per "
        f"byte of the first {PLAY_BYTES:,} bytes of a play held out of training and of the stream, read "
        f"next; numbers told next and asked for {BACK:,} bytes later, % of {ROWS} with 95 % interval.",
    ]
    for name in sorted({key.split(", ")[0] for key in found}):
        reads = [(int(key.split(", ")[2]), value) for key, value in found.items() if f"{name}, read" in key]
        reads = [(tokens, at) for tokens, at in reads if tokens == EARLY or tokens % MILLION == 0]
        if not reads:
            continue
        lines += [
            "",
            f"## {name}",
            "",
            "| tokens | tokens/s | peak MB | growth | state bytes | bits per byte | recalled |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for tokens, at in sorted(reads):
            lines.append(
                f"| {tokens:,} | {speed(at):,.0f} | {at['peak'] / 1e6:.0f} | "
                f"{growth(at):+.2f} % | {at['state_bytes']:,} | "
                f"{asked(found, name, tokens)} |"
            )
        lines += ["", f"{reads[-1][1]['date']}, {reads[-1][1]['machine']}"]
    REPORT.write_text("\n".join(lines) + "\n")


def asked(found: Found, name: str, tokens: int) -> str:
    """Two cells, empty where nothing was asked."""
    at = found.get(f"{name}, asked, {tokens}")
    if at is None:
        return " | "
    low, high = wilson(at["right"], at["rows"])
    rate = 100 * at["right"] / at["rows"]
    return f"{at['bits_per_byte']:.3f} | {rate:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=zoo.names(), choices=zoo.names())
    parser.add_argument("--most", type=int, default=MARKS[-1], help="tokens to read (default 10,000,000)")
    parser.add_argument("--work", type=Path, default=Path("runs/endless"), help="folder of the memories")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _, held_out = hold_out(load_corpus("shakespeare"), 0.1)
    text = distinct_bytes(arguments.most, without=held_out[0].data)
    for name in arguments.models:
        folder = arguments.work / name
        folder.mkdir(parents=True, exist_ok=True)
        # In a process of its own, whose peak nothing else raises.
        reader = multiprocessing.get_context("spawn").Process(
            target=stream, args=(name, text, folder, arguments.threads)
        )
        reader.start()
        reader.join()
        if reader.exitcode:
            return 1
        for mark in MARKS:
            ask(name, mark, folder, held_out[0].data[:PLAY_BYTES], text)
        report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
