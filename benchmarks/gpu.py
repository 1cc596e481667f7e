"""On a CUDA device: every backend against the float64 oracle, then throughput of layers, decoding and models.

    python benchmarks/gpu.py                        # prints the table
    python benchmarks/gpu.py --output results.md    # and writes it

Without a CUDA device it says so and exits 0; if a backend disagrees with the oracle it prints no timing and
exits 1.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_layers import check, check_decoding, decode_rows, layer_rows
from gpu_models import decoding_rows, model_rows, step_rows

# What is timed: a title, the columns, and what makes the rows until a deadline.
SECTIONS: tuple[tuple[str, str, Callable[[float], Iterator[str]]], ...] = (
    (
        "Memory layer, float32 state, tokens per second (median of 5):",
        "| layer | backend | operands | chunk | batch × time | forward | with backward "
        "| forward TFLOP/s | of bfloat16 peak | with backward |",
        layer_rows,
    ),
    (
        "Decoding: a memory layer token by token, float32, without gradients. Tokens per second not "
        "recorded, and recorded as a CUDA graph of 32 tokens; what the kernel has to move, per second:",
        "| layer | backend | batch | not recorded | recorded | µs a token, recorded | GB/s |",
        decode_rows,
    ),
    (
        "Training step of tiny models, tfloat32, memory carried: tokens per second, and recorded as "
        "a CUDA graph (`cuda_graph` in training); once: recording; error: of any gradient, by norm:",
        "| model | batch × time | not recorded | recorded | once | error |",
        step_rows,
    ),
    (
        "Training step under bfloat16 autocast (median of 3), and how many times the transformer's it takes:",
        "| model | batch × time | tokens/s | times | peak memory |",
        model_rows,
    ),
    (
        "One more token of one row, bfloat16, not recorded; a transformer's is a token after 64 others, and "
        "attention to as many keys in each layer:",
        "| model | tokens before | ms | transformer, ms | times |",
        decoding_rows,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--minutes", type=float, default=6.0, help="of timing, after the checks (default 6)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 0
    checked, absent = check("cuda")
    checked += check_decoding("cuda")
    lines: list[str] = []

    def say(*more: str) -> None:
        # At once: a run that is cut short leaves what it has measured.
        print(*more, sep="\n", flush=True)
        lines.extend(more)
        if arguments.output is not None:
            arguments.output.write_text("\n".join(lines) + "\n")

    say(
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}; "
        "`python benchmarks/gpu.py`",
        "",
        "Against the float64 oracle (largest relative error of reads and all gradients):",
        "",
        "| backend | dtype | memory | error | |",
        "|---|---|---|---|---|",
        *checked,
        "",
        f"Not for this device: {', '.join(absent) or 'none'}.",
    )
    if any("WRONG" in line for line in checked):
        return 1
    end = time.monotonic() + 60 * arguments.minutes
    for number, (title, columns, rows) in enumerate(SECTIONS):
        # Each has its share of the time that is left.
        now = time.monotonic()
        deadline = now + max(end - now, 0) / (len(SECTIONS) - number)
        torch.set_float32_matmul_precision("high")
        say("", title, "", columns, "|---" * (columns.count("|") - 1) + "|")
        for row in rows(deadline):
            say(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
