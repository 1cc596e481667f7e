"""Does torch.compile pay? A model's training step and forward pass, compiled whole and not compiled.

    python benchmarks/compiled.py                     # every model in the zoo (MAC: slowly)
    python benchmarks/compiled.py --models titans-lmm-tiny --rows 8

Both are run in turn in one process, the fastest run of each counts. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from titans import zoo
from titans.hf import TitansForCausalLM

ROUNDS = 7


def train_step(model: Callable[..., object], ids: Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()  # type: ignore[attr-defined]


@torch.no_grad()
def read(model: Callable[..., object], ids: Tensor) -> None:
    model(ids, use_cache=False)


def seconds(run: Callable[..., None], model: Callable[..., object], ids: Tensor) -> float:
    began = time.perf_counter()
    run(model, ids)
    return time.perf_counter() - began


def row(name: str, ids: Tensor) -> str:
    model: TitansForCausalLM = zoo.load(name)[0].train()
    compiled = torch.compile(model, fullgraph=True)
    cells = []
    for run in (train_step, read):
        cells.append(f"{seconds(run, compiled, ids):.0f}")
        pairs = [(seconds(run, model, ids), seconds(run, compiled, ids)) for _ in range(ROUNDS)]
        plain, fast = map(min, zip(*pairs, strict=True))
        cells.append(f"{1000 * plain:.0f} | {1000 * fast:.0f} | {plain / fast:.2f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=zoo.names(), help="names or folders")
    parser.add_argument("--rows", type=int, default=4, help="rows of 512 bytes (default 4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = torch.randint(256, (arguments.rows, 512))
    print(
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, {arguments.threads} "
        f"thread; {arguments.rows} rows of 512 bytes\n"
    )
    print("| model | s to compile | step, ms | compiled | times as fast ", end="")
    print("| s to compile | forward, ms | compiled | times as fast |")
    print("|---" * 9 + "|", flush=True)
    for name in arguments.models:
        print(row(name, ids), flush=True)


if __name__ == "__main__":
    main()
