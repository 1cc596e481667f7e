"""How fast is it, against what this machine can do and against others? (`make bench`)

    python benchmarks/speed                       # everything: half an hour or more
    python benchmarks/speed --resume              # the same, going on where it was interrupted
    python benchmarks/speed --quick               # three minutes
    python benchmarks/speed --parts scan layer    # some of it
    python benchmarks/speed --peers .venv-peers/bin/python   # with titans-pytorch and open-titans
    python benchmarks/speed --quick --against ../before/src  # compared with another checkout of this library

Every contender runs in a process of its own. For each case they take turns, A B C, C B A, …, so that a
machine that slows down slows them all; the table has medians and the spread. Writes .md, .json and .png of
benchmarks/results/speed-PROCESSOR after every case (--quick and --against: prints only). --against
compares processor time, which other processes disturb less; every row that looks slower than before is timed
four times as often, and the exit status is 1 if one still does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contenders import Case, floating_operations
from forms import NAMES
from goals import goals
from report import SLOWER, comparison, paired, picture, ratios, tables

from titans.experiments.results import encoded
from titans.train.checkpoint import write_bytes

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
SOURCE = HERE.parents[1] / "src"
PARTS = ("scan", "layer", "forms", "model", "mac", "decode")
OURS = ("titans, native", "titans, bfloat16", "titans, torch")
PEERS = ("titans-pytorch", "titans-pytorch, sequential", "titans-pytorch, per token", "open-titans")
Row = dict[str, Any]


class Contender:
    """A process that times one contender, with the library of a source folder if one is given."""

    def __init__(self, python: str, source: Path | None) -> None:
        environment = dict(os.environ) if source is None else {**os.environ, "PYTHONPATH": str(source)}
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if source is not None and self.ask(do="where").get("folder") != str(source):
            raise SystemExit(f"{source}: no library that can be imported from there")

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


class Contenders:
    """The processes, started when they are first needed."""

    def __init__(self, peers: str | None, against: Path | None) -> None:
        self.peers, self.against = peers, against
        self.running: dict[tuple[str, bool], Contender] = {}

    def ask(self, row: Row, **request: Any) -> dict[str, Any]:
        """Ask the contender of that row; one that died is started again next time."""
        name, before = key = row["contender"], row.get("before", False)
        if key not in self.running:
            if name in PEERS:
                self.running[key] = Contender(self.peers or sys.executable, None)
            else:
                self.running[key] = Contender(sys.executable, self.against if before else SOURCE)
        answer = self.running[key].ask(**request)
        if "the process died" in answer.get("error", ""):
            self.running.pop(key).close()
        return answer

    def close(self) -> None:
        """End all processes."""
        for contender in self.running.values():
            contender.close()


def measure(
    contenders: Contenders, case: Case, names: list[str], threads: int, turns: int, patience: float
) -> list[Row]:
    """Time a case for every contender, taking turns."""
    rows: list[Row] = []
    for name in names:
        rows.append({"case": case, "threads": threads, "contender": name, "seconds": [], "processor": []})
        if contenders.against is not None and name in OURS:
            rows.append(rows[-1] | {"seconds": [], "processor": [], "before": True})
    for row in rows:
        row |= contenders.ask(row, do="build", contender=row["contender"], case=case, threads=threads)
        first = min(r.get("first", math.inf) for r in rows if r["contender"] == row["contender"])
        for same in rows:
            if same["contender"] == row["contender"]:
                same["repeat"] = max(1, int(0.05 / max(first, 1e-9)))
    for turn in range(turns):
        time_once(contenders, rows, turn, patience)
    for pair in paired(rows):
        for turn in range(turns, 4 * turns):
            if ratios(*pair)[1] > SLOWER:
                time_once(contenders, list(pair), turn, 4 * patience)
    for row in rows:
        if contenders.against is None and "error" not in row and row["first"] < 5 * patience:
            row["bytes"] = contenders.ask(row, do="peak").get("bytes")
        # What a contender holds must not crowd the caches, and the memory, of the next case.
        contenders.ask(row, do="forget")
        if row["seconds"]:
            row["median"] = statistics.median(row["seconds"])
            if case["kind"] in ("product", "scan"):
                row["rate"] = floating_operations(case) / row["median"]
    return rows


def time_once(contenders: Contenders, rows: list[Row], turn: int, patience: float) -> None:
    """One turn of every row that has not used up its time, in the opposite order from turn to turn."""
    for row in rows if turn % 2 == 0 else reversed(rows):
        spent = sum(row["seconds"]) * row.get("repeat", 1)
        if "error" in row or (turn and spent + spent / turn > patience):
            continue
        answer = contenders.ask(row, do="time", repeat=row["repeat"])
        if "error" in answer:
            row["error"] = answer["error"]
        else:
            row["seconds"].append(answer["seconds"])
            row["processor"].append(answer["processor"])


Plan = list[tuple[Case, list[str], tuple[int, ...]]]
BASE = dict(width=256, expansion=4, chunk=64, time=4096)


def around_base(quick: bool) -> list[tuple[Case, tuple[int, ...]]]:
    """One layer and the threads to time it with: width 256, expansion 4, 4096 tokens, one thing changed at a
    time."""
    both, one = ((1,) if quick else (1, 2)), (1,)
    found = [(BASE | dict(chunk=chunk), both) for chunk in (16, 64)]
    if not quick:
        found += [(BASE | dict(time=time), one) for time in (1024, 16384, 65536)]
        shapes = [(256, 1, 16), (256, 2, 16), (256, 1, 64), (256, 2, 64), (256, 4, 256)]
        shapes += [(768, 4, 16), (768, 4, 64), (768, 1, 64), (768, 2, 64)]
        found += [(BASE | dict(width=w, expansion=e, chunk=c), one) for w, e, c in shapes]
    return [(c | dict(backward=backward), threads) for c, threads in found for backward in (False, True)]


def plan(part: str, quick: bool, peers: bool) -> Plan:
    """The cases of a part, who takes part in each, and with how many threads."""
    both, one = ((1,) if quick else (1, 2)), (1,)
    if part == "product":
        shapes = [(1, 512, 512, 512), (1, 1024, 1024, 1024)]
        shapes += [(4, chunk, 64, 256) for chunk in (16, 64)] + [(4, chunk, 256, 64) for chunk in (16, 64)]
        return [(dict(kind="product", shape=shape), ["product"], both) for shape in shapes]
    if part == "scan":
        return [
            (dict(kind="scan", **case), list(OURS), threads)
            for case, threads in around_base(quick)
            if case["time"] == BASE["time"]
        ]
    if part == "layer":
        planned: Plan = []
        for case, threads in around_base(quick):
            names = [*OURS, "attention"]
            if case["time"] > 16384:
                names = [*OURS[:2]] if case["backward"] else [*OURS[:2], "attention"]
            elif peers and case["chunk"] == 64 and (case["width"], case["expansion"]) == (256, 4):
                names += PEERS[:2]
            planned.append((dict(kind="layer", **case), names, threads))
        token = dict(kind="layer", **BASE | dict(time=1024))
        if peers and not quick:
            planned += [
                (token | dict(backward=backward), ["titans, native", PEERS[2]], one)
                for backward in (False, True)
            ]
        if not quick:
            lengths = (4096, 65536, 1048576)
            planned += [
                (dict(kind="stream", **BASE | dict(time=time)), ["titans, native"], one) for time in lengths
            ]
        return planned
    if part == "forms":
        base = dict(width=256, time=4096)
        return [
            (dict(kind=kind, **base, chunk=chunk, backward=backward), list(NAMES), one)
            for kind in ("equal scan", "equal layer")
            for chunk in ((16,) if quick else (16, 64))
            for backward in (False, True)
        ]
    if part == "mac":
        # Chunks of 64, where the preset has 16: the peers' chunk is a segment.
        planned = []
        base = dict(preset="small", variant="mac", chunk=64)
        for segment in (64, 512):
            for kind in ("train", "prefill"):
                model = base | dict(kind=kind, time=2048, segment=segment)
                names = ["titans, native", "titans, bfloat16", *([PEERS[0], PEERS[3]] if peers else [])]
                planned.append((model, names, both if segment == 64 else one))
        long = base | dict(kind="train", time=16384, segment=64)
        return planned if quick else [*planned, (long, ["titans, native"], one)]
    if part == "decode":
        planned = []
        for variant in ("lmm", "mac", "mag"):
            for kind in ("decode", "generate"):
                model = dict(preset="small", variant=variant, memory_depth=1, kind=kind, time=1024)
                # Of transformers' own models one is enough.
                names = ["titans, native", *(["transformers"] if variant == "lmm" else [])]
                planned.append((model, names, one))
        return planned
    planned = []
    for variant in ("lmm",) if quick else ("lmm", "mac", "mag", "mal"):
        model = dict(preset="tiny" if quick else "small", variant=variant)
        # The transformer is the same for every variant.
        names = [*OURS, "attention"] if variant == "lmm" else list(OURS)
        for kind, lengths in (("train", (4096, 16384)), ("prefill", (4096,)), ("decode", (1024, 16384))):
            planned += [
                (
                    model | dict(kind=kind, time=time),
                    [n for n in names if n != "titans, torch" or time == 4096],
                    one,
                )
                for time in ((1024,) if quick else lengths)
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
    parser.add_argument("--resume", action="store_true", help="keep what there is of this processor")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="forms is not compared by --against"
    )
    parser.add_argument("--peers", help="python of an environment with titans-pytorch and open-titans")
    parser.add_argument("--against", type=Path, help="src folder of another checkout of this library")
    parser.add_argument("--turns", type=int, default=5, help="times that each contender is timed")
    parser.add_argument("--patience", type=float, default=12, help="seconds of a contender in one case")
    arguments = parser.parse_args()
    if arguments.peers and not Path(arguments.peers).exists():
        parser.error(f"--peers {arguments.peers}: no such file; give the python of an environment")
    if arguments.against and not (arguments.against / "titans").is_dir():
        parser.error(f"--against {arguments.against}: no folder titans in it; give the src of a checkout")
    against = arguments.against.resolve() if arguments.against else None
    prints_only = arguments.quick or against is not None
    about = (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {processor()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}; `make bench`; "
        f"medians of up to {arguments.turns} turns."
    )
    rows: list[Row] = []
    kept = RESULTS / f"{results_name()}.json"
    if arguments.resume and kept.exists():
        rows = json.loads(kept.read_text())["rows"]
    parts = [part for part in arguments.parts if against is None or part != "forms"]
    known = [(row["case"], row["threads"]) for row in rows]
    planned = [
        (json.loads(json.dumps(case)), names, threads)  # as it reads back: tuples become lists
        for part in [*([] if against else ["product"]), *parts]
        for case, names, counts in plan(part, arguments.quick, bool(arguments.peers))
        for threads in counts
    ]
    planned = [(case, names, threads) for case, names, threads in planned if (case, threads) not in known]
    contenders, began = Contenders(arguments.peers, against), time.monotonic()
    try:
        for number, (case, names, threads) in enumerate(planned, start=1):
            elapsed = time.monotonic() - began
            left = elapsed / max(number - 1, 1) * (len(planned) - number + 1)
            print(
                f"{number}/{len(planned)} {describe(case)}, {threads} thread{'s' * (threads > 1)}; "
                f"about {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
            rows += measure(contenders, case, names, threads, arguments.turns, arguments.patience)
            if not prints_only:
                save(about, rows)
    finally:
        contenders.close()
    if against is not None:
        text, slower = comparison(rows)
        print(f"{about} Compared with {against}.\n\n{text}")
        return int(slower)
    if not prints_only:
        save(about, rows)
    print(f"{goals(rows)}\n\n{tables(about, rows)}")
    return 0


def save(about: str, rows: list[Row]) -> None:
    """The tables, the numbers and the picture, each in place of the last."""
    RESULTS.mkdir(exist_ok=True)
    kept = [
        {key: value for key, value in row.items() if key not in ("first", "repeat", "processor")}
        for row in rows
    ]
    for ending, content in (
        ("md", f"{tables(about, rows)}\n### Goals\n\n{goals(rows)}\n".encode()),
        ("json", encoded({"about": about}, kept, "rows")),
    ):
        write_bytes(RESULTS / f"{results_name()}.{ending}", content)
    picture(rows, RESULTS / f"{results_name()}.png")


def results_name() -> str:
    """Where this processor's results go: those of another are never mixed with them."""
    words = re.sub(r"\((R|TM)\)|Processor|CPU|@.*", " ", processor())
    return "-".join(["speed", *re.findall(r"[a-z0-9]+", words.lower())])


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "an unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    sys.exit(main())
