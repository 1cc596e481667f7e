"""How fast is it, against what this machine can do and against others? (`make bench`)

    python benchmarks/speed                       # everything; long
    python benchmarks/speed --quick               # three minutes
    python benchmarks/speed --parts scan layer    # some of it
    python benchmarks/speed --peers .venv-peers/bin/python   # with titans-pytorch, in its own environment

Every contender runs in a process of its own. For each case they take turns, A B C A B C …, so that a machine
that slows down slows them all; the table has medians and the spread. Writes benchmarks/results/speed.md,
.json and .png (--quick: prints only).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contenders import Case, floating_operations
from report import picture, tables

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
OURS = ("titans, native", "titans, torch")
PEERS = ("titans-pytorch", "titans-pytorch, sequential")
Row = dict[str, Any]


class Contender:
    """A process that times one contender."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": "the process died: out of memory?"}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(case: Case, names: list[str], threads: int, arguments: argparse.Namespace) -> list[Row]:
    """Time a case for every contender, taking turns."""
    contenders = []
    rows: list[Row] = []
    for name in names:
        python = arguments.peers if name.startswith("titans-pytorch") else sys.executable
        contender = Contender(python)
        answer = contender.ask(do="build", contender=name, case=case, threads=threads)
        row: Row = {"case": case, "threads": threads, "contender": name, "seconds": [], **answer}
        rows.append(row)
        if "error" in answer:
            contender.close()
            continue
        row["repeat"] = max(1, int(0.05 / max(answer["first"], 1e-9)))
        contenders.append((contender, row))
    for turn in range(arguments.turns):
        for contender, row in contenders:
            if turn and sum(row["seconds"]) * row["repeat"] > arguments.patience:
                continue
            answer = contender.ask(do="time", repeat=row["repeat"])
            if "error" in answer:
                row["error"] = answer["error"]
            else:
                row["seconds"].append(answer["seconds"])
    for contender, row in contenders:
        row["bytes"] = contender.ask(do="peak").get("bytes")
        contender.close()
    return rows


def layer_cases(quick: bool) -> list[Case]:
    """Around one layer: width 256, expansion 4, chunk 16 and 64, 4096 tokens; one thing changed at a time."""
    base = dict(width=256, expansion=4, chunk=16, time=4096)
    lengths = () if quick else (1024, 16384, 65536)
    found = [base | dict(chunk=chunk) for chunk in (16, 64)]
    found += [base | dict(chunk=chunk, time=length) for length in lengths for chunk in (16, 64)]
    if not quick:
        found += [
            base | dict(width=width, expansion=expansion, chunk=chunk)
            for width in (256, 768)
            for expansion in (1, 2, 4)
            for chunk in (16, 64, 256)
            if (width, expansion, chunk) not in ((256, 4, 16), (256, 4, 64))
        ]
    return [case | dict(backward=backward) for case in found for backward in (False, True)]


def plan(part: str, quick: bool, peers: bool) -> list[tuple[Case, list[str]]]:
    """The cases of a part and who takes part in each."""
    if part == "product":
        shapes = [(1, 512, 512, 512), (1, 1024, 1024, 1024)]
        shapes += [(4, chunk, 64, 256) for chunk in (16, 64)] + [(4, chunk, 256, 64) for chunk in (16, 64)]
        return [(dict(kind="product", shape=shape), ["product"]) for shape in shapes]
    if part == "scan":
        return [(dict(kind="scan", **case), list(OURS)) for case in layer_cases(quick)]
    if part == "layer":
        planned = []
        for case in layer_cases(quick):
            names = [*OURS, "attention"]
            if peers and case["chunk"] == 64 and case["width"] == 256:
                names += PEERS
            planned.append((dict(kind="layer", **case), names))
        if peers and not quick:
            token = dict(kind="layer", width=256, expansion=4, chunk=64, time=1024)
            planned += [
                (token | dict(backward=backward), ["titans, native", "titans-pytorch, per token"])
                for backward in (False, True)
            ]
        return planned
    planned = []
    for preset in ("tiny",) if quick else ("tiny", "small"):
        for variant in ("lmm",) if quick else ("mac", "mag", "mal", "lmm"):
            model = dict(preset=preset, variant=variant)
            lengths = (1024,) if quick else (1024, 4096, 16384)
            planned += [
                (model | dict(kind=kind, time=length), [*OURS, "attention"])
                for kind in ("train", "prefill", "decode")
                for length in lengths
            ]
    return planned


def describe(case: Case) -> str:
    """A case in a few words."""
    return " ".join(f"{name}={value}" for name, value in case.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three minutes, one thread, prints only")
    parser.add_argument(
        "--parts", nargs="+", default=["scan", "layer", "model"], choices=["scan", "layer", "model"]
    )
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and 2, with --quick 1")
    parser.add_argument("--peers", help="python of an environment with titans-pytorch")
    parser.add_argument("--turns", type=int, default=5, help="times that each contender is timed")
    parser.add_argument("--patience", type=float, default=30, help="seconds of a contender in one case")
    arguments = parser.parse_args()
    if arguments.peers and not Path(arguments.peers).exists():
        parser.error(f"--peers {arguments.peers}: no such file; give the python of an environment")
    began, rows = time.monotonic(), []
    planned = [
        (case, names, threads)
        for part in ["product", *arguments.parts]
        for case, names in plan(part, arguments.quick, bool(arguments.peers))
        for threads in arguments.threads or ((1,) if arguments.quick else (1, 2))
    ]
    for number, (case, names, threads) in enumerate(planned, start=1):
        elapsed = time.monotonic() - began
        left = elapsed / max(number - 1, 1) * (len(planned) - number + 1)
        print(
            f"{number}/{len(planned)} {describe(case)}, {threads} thread{'s' * (threads > 1)}; "
            f"about {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
        for row in measure(case, names, threads, arguments):
            rows.append(row)
            if row["seconds"]:
                row["median"] = statistics.median(row["seconds"])
                if case["kind"] in ("product", "scan"):
                    row["rate"] = floating_operations(case) / row["median"]
    about = (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {processor()}, "
        f"torch {torch.__version__}; `python benchmarks/speed {' '.join(sys.argv[1:])}`; "
        f"medians of up to {arguments.turns} turns."
    )
    text = tables(about, rows)
    print(text)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed.md").write_text(text)
        (RESULTS / "speed.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        picture(rows, RESULTS / "speed.png")
    return 0


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "an unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    sys.exit(main())
