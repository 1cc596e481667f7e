"""Read a long text at constant memory, save what was learned, and go on from the file.

    python examples/stream_a_book.py [CHECKPOINT [TEXT]]

CHECKPOINT is a folder written by `titans train`, or the name of a model of the library, by default
titans-lmm-tiny. TEXT is a file; by default two acts of The Tempest.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import titans
from titans.data import load_corpus


def main(checkpoint: str = "titans-lmm-tiny", text: str | None = None) -> None:
    torch.manual_seed(0)
    model, tokenizer = titans.load(checkpoint)
    documents = load_corpus(text) if text else load_corpus("excerpt")[2:4]

    session = titans.Session(model, tokenizer)
    for document in documents:
        result = session.feed(document.data)
        stats = session.stats()
        print(
            f"{document.name}: {result.tokens:,} tokens, {result.tokens / result.seconds:,.0f} tokens/s, "
            f"mean surprise {result.mean_surprise:.3f}, state {stats.state_bytes:,} bytes, "
            f"memory moved by {100 * stats.layers[0].change:.1f} %"
        )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "book.memory")
        session.save(path)
        print(f"saved: {path.stat().st_size:,} bytes after {session.num_tokens:,} tokens")
        later = titans.Session.load(path, model, tokenizer)

    # A fork costs nothing, and one memory can be asked several questions.
    for question in ("PROSPERO:\n", "MIRANDA:\n"):
        fork = later.fork()
        fork.feed(question)
        print(question + fork.generate(max_new_tokens=40, do_sample=True, temperature=0.8))


if __name__ == "__main__":
    main(*sys.argv[1:])
