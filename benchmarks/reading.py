"""How fast does a graft read, and what does bfloat16 cost in prediction?

    python benchmarks/reading.py                # titans-smollm2-135m, 2,048 tokens, three turns: two minutes
    python benchmarks/reading.py --turns 1

Prints tokens a second of processor time, median and range, for each precision, of the graft and of its base
alone in the same window, and the bits per byte of a text in both. The precisions take turns in one process
with one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import titans
from titans.data import load_corpus
from titans.zoo.precision import convert

PRECISIONS = ("float32", "bfloat16")
# Tokens that are read before, so that keys move; and tokens a call.
BEFORE, PIECE = 1024, 1024


def seconds_of_graft(model: Any, ids: Tensor) -> float:
    session = titans.Session(model)
    session.feed(ids[: BEFORE + 1])
    began = time.thread_time()
    session.feed(ids[BEFORE + 1 :])
    return time.thread_time() - began


@torch.inference_mode()
def seconds_of_base(model: Any, ids: Tensor) -> float:
    base = model._windowed
    _, state = base.read(ids[None, :BEFORE], base.initial_state(1))
    began = time.thread_time()
    base.read(ids[None, BEFORE:-1], state)
    return time.thread_time() - began


@torch.inference_mode()
def bits_per_byte(model: Any, ids: Tensor, num_bytes: int) -> tuple[float, float]:
    """Of the graft, and of its base in the same window."""
    cache, nats = None, [0.0, 0.0]
    for piece in ids[None].split(PIECE, 1):
        output = model(piece, past_key_values=cache, use_cache=True, output_base_logits=True)
        cache = output.past_key_values
        for index, logits in enumerate((output.logits, output.base_logits)):
            nats[index] += float(F.cross_entropy(logits[0, :-1].float(), piece[0, 1:], reduction="sum"))
    return nats[0] / math.log(2) / num_bytes, nats[1] / math.log(2) / num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="titans-smollm2-135m")
    parser.add_argument("--text", default="shakespeare/king-lear", help="a corpus, or a file")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = titans.load(given.model, dtype="float32")
    text = bytes(load_corpus(given.text)[0].data).decode()
    ids = torch.tensor(tokenizer.encode(text))[: BEFORE + given.tokens + 1]
    num_bytes = len(tokenizer.decode(ids).encode())
    # Its own weights again in each turn: those that were rounded do not come back.
    weights = {name: value.clone() for name, value in model.base.state_dict().items()}
    seconds, bits = defaultdict(list), {}
    for _ in range(given.turns):
        for precision in PRECISIONS:
            convert(model.base, torch.float32)
            model.base.load_state_dict(weights)
            convert(model.base, getattr(torch, precision))
            seconds[precision, "graft"].append(seconds_of_graft(model, ids))
            seconds[precision, "base alone"].append(seconds_of_base(model, ids))
            if precision not in bits:
                bits[precision] = dict(
                    zip(("graft", "base alone"), bits_per_byte(model, ids, num_bytes), strict=True)
                )
    print("| | precision | tokens/s (range) | bits per byte |\n|---|---|---|---|")
    for (precision, what), found in seconds.items():
        rates = sorted(given.tokens / each for each in found)
        change = bits[precision][what] / bits[PRECISIONS[0]][what] - 1
        print(
            f"| {what} | {precision} | {median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f}) "
            f"| {bits[precision][what]:.4f} ({change:+.2%}) |"
        )


if __name__ == "__main__":
    main()
