"""A memory at work, step by step: what surprises it, what it writes, and what it reads back.

    python examples/memory_step_by_step.py [PICTURE.png]

titans-mag-tiny, whose attention sees 64 bytes, reads a fact, a piece of The Tempest, and the question for the
fact, all in one call. The picture shows, byte by byte:

- surprise ‖M(k) − v‖², the loss that every byte's write descends (equation 12 of the paper);
- the step size θ of that write (14), of the head that keeps things longest;
- the probability of each byte, with the memory and with its step sizes set to 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

import titans
from titans.data import load_corpus

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FACT = "One of the special magic numbers for tomirena is: 4081725. "
QUESTION = " What is the special magic number for tomirena? The special magic number for tomirena is: "
ANSWER = "4081725."


def probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of every byte but the first, (n − 1,)."""
    return logits[0, :-1].softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


@torch.no_grad()
def main(picture: str = "step-by-step.png") -> None:
    model, tokenizer = titans.load("titans-mag-tiny")
    play = load_corpus("excerpt")[1].data[1000:1250].decode()
    text = FACT + play + QUESTION + ANSWER
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape == (1, len(text)), "one token for each byte"

    with_memory = model(ids, output_trace=True)
    without = model(ids, freeze_memory=True)
    # Of each layer (1, n, heads): here the mean over heads and layers.
    surprise = torch.stack([trace.surprise[0].mean(-1) for trace in with_memory.traces]).mean(0)
    # The last head has the longest half-life.
    step = torch.stack([trace.step_size[0, :, -1].mean(-1) for trace in with_memory.traces]).amax(0)
    known, unknown = (probabilities(out.logits, ids) for out in (with_memory, without))

    parts = {"fact": len(FACT), "play": len(play), "question": len(QUESTION), "answer": len(ANSWER)}
    begin = 0
    for name, length in parts.items():
        end = begin + length
        inside = slice(max(begin - 1, 0), end - 1)  # the probabilities begin with the second byte
        print(
            f"{name:8} {length:3} bytes: surprise {surprise[begin:end].mean():.3f}, "
            f"largest step {step[begin:end].max():.3f}, "
            f"probability {known[inside].mean():.2f} with the memory, {unknown[inside].mean():.2f} without"
        )
        begin = end

    figure, axes = plt.subplots(3, 1, figsize=(11, 6), sharex=True, layout="constrained")
    axes[0].plot(surprise, color="tab:red", linewidth=0.9)
    axes[0].set_ylabel("surprise")
    axes[1].plot(step, color="tab:blue", linewidth=0.9)
    axes[1].set_ylabel("step size θ")
    axes[2].plot(range(1, len(text)), known, color="tab:green", linewidth=0.9, label="with the memory")
    axes[2].plot(range(1, len(text)), unknown, color="tab:gray", linewidth=0.9, label="without")
    axes[2].set_ylabel("probability")
    axes[2].legend(loc="upper left", fontsize=8)
    axes[2].set_xlabel("byte")
    begin = 0
    for name, length in parts.items():
        axes[0].annotate(name, (begin + length / 2, 1.02), xycoords=("data", "axes fraction"), ha="center")
        for axis in axes:
            axis.axvline(begin, color="black", linewidth=0.5)
        begin += length
    figure.savefig(Path(picture), dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
