"""Does a memory file that was altered ever pass for one? Files mutated at random, each loaded.

    python benchmarks/fuzz_files.py                        # 10,000 files, counts by kind
    python benchmarks/fuzz_files.py --count 200 --seed 7

Each has to be refused with a ValueError, within seconds and without much memory. Some are altered as they
are on a disk, others by somebody who knows the format and puts a right checksum on numbers that are none.
Ends with 1 if any file loads, takes long, grows the process, or fails in another way; these are kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from titans.hf import TitansConfig, TitansForCausalLM
from titans.hf.state_file import seal
from titans.stream import Session

SECONDS, GROWTH_KIB = 5, 200 * 1024
Generator = np.random.Generator
Mutation = Callable[[bytes, Generator], bytes]
_FLOATS = {"F32": np.float32, "F64": np.float64}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def flipped_bit(content: bytes, generator: Generator) -> bytes:
    at = int(generator.integers(len(content)))
    return content[:at] + bytes([content[at] ^ 1 << int(generator.integers(8))]) + content[at + 1 :]


def flipped_header_bit(content: bytes, generator: Generator) -> bytes:
    at = int(generator.integers(8 + int.from_bytes(content[:8], "little")))
    return content[:at] + bytes([content[at] ^ 1 << int(generator.integers(8))]) + content[at + 1 :]


def another_blank(content: bytes, generator: Generator) -> bytes:
    """The same to whoever reads JSON."""
    length = int.from_bytes(content[:8], "little")
    return joined(
        content[8 : 8 + length] + b" \t\n "[: 1 + int(generator.integers(4))], content[8 + length :]
    )


def truncated(content: bytes, generator: Generator) -> bytes:
    return content[: int(generator.integers(len(content)))]


def extended(content: bytes, generator: Generator) -> bytes:
    return content + generator.bytes(int(generator.integers(1, 5000)))


def a_hole(content: bytes, generator: Generator) -> bytes:
    at, size = (int(generator.integers(n)) for n in (len(content), 4096))
    found = content[:at] + b"\0" * min(size + 1, len(content) - at) + content[at + size + 1 :]
    return found if found != content else flipped_bit(content, generator)


def swapped(content: bytes, generator: Generator) -> bytes:
    size = int(generator.integers(1, 512))
    a, b = sorted(generator.choice(len(content) // size, 2, replace=False).tolist())
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    parts[a], parts[b] = parts[b], parts[a]
    found = b"".join(parts)
    return found if found != content else flipped_bit(content, generator)


def a_wrong_length(content: bytes, generator: Generator) -> bytes:
    return (
        int(generator.integers(2**63)).to_bytes(8, "little")[: 8 - int(generator.integers(4))].ljust(8, b"\0")
        + content[8:]
    )


def noise(content: bytes, generator: Generator) -> bytes:
    return generator.bytes(int(generator.integers(20_000)))


def deep(content: bytes, generator: Generator) -> bytes:
    _, data = split(content)
    return joined(b"[" * int(generator.integers(1, 200_000)), data)


def a_wrong_entry(content: bytes, generator: Generator) -> bytes:
    """A shape, type or place in the file that is not the tensor's."""
    header, data = split(content)
    name = str(generator.choice([n for n in header if n != "__metadata__"]))
    entry = header[name]
    kind = int(generator.integers(5))
    if kind == 0:
        entry["shape"] = [*entry["shape"], 2 ** int(generator.integers(1, 62))]
    elif kind == 1:
        entry["shape"] = entry["shape"][:-1]
    elif kind == 2:
        entry["dtype"] = str(generator.choice(["BOOL", "U8", "F16", "BF16", "I32", "C64", "F8_E4M3", "X"]))
    elif kind == 3:
        entry["data_offsets"] = [int(x) for x in generator.integers(2**62, size=2)]
    else:
        header[f"{name}x"] = header.pop(name)
    return joined(header, data)


def wrong_numbers(content: bytes, generator: Generator) -> bytes:
    """Values that no model writes: NaN and infinity, or positions that contradict each other."""
    header, data = split(content)
    filled = [n for n in header if n != "__metadata__" and np.prod(header[n]["shape"]) > 0]
    entry = header[str(generator.choice(filled))]
    begin, end = entry["data_offsets"]
    if entry["dtype"] == "I64":
        values = np.frombuffer(data[begin:end], np.int64).copy()
        values[:] = values + int(generator.choice([-(2**40), -1, 1, 2**40, 2**62]))
        if len([n for n in filled if header[n]["dtype"] == "I64"]) == 1:
            values[:] = -1
    else:
        values = np.frombuffer(data[begin:end], _FLOATS[entry["dtype"]]).copy()
        values[generator.integers(len(values))] = generator.choice([np.nan, np.inf, -np.inf])
    return joined(header, data[:begin] + values.tobytes() + data[end:])


def a_wrong_fact(content: bytes, generator: Generator) -> bytes:
    """A header that says something else."""
    header, data = split(content)
    about = header["__metadata__"]
    name = str(generator.choice(["format", "config", "num_columns", "same", "recent_tokens", "fingerprint"]))
    wrong = ["", "x", "{", "-1", "null", "9" * 5000, "[" * 5000, '{"a": "b"}', "[1e999]"]
    about[name] = str(generator.choice(wrong))
    if name == "fingerprint":
        about[name] = about[name] or "x"
    return joined(header, data)


# Altered without care, and with a right checksum.
PLAIN: tuple[Mutation, ...] = (
    flipped_bit, flipped_header_bit, another_blank, truncated, extended, a_hole, swapped, a_wrong_length,
    noise, deep, a_wrong_entry, wrong_numbers, a_wrong_fact,
)  # fmt: skip
SEALED: tuple[Mutation, ...] = (a_wrong_entry, wrong_numbers, a_wrong_fact)


class TooSlow(Exception):
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def tried(path: Path, model: TitansForCausalLM) -> str:
    """How loading ends."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        Session.load(path, model)
        outcome = "LOADED"
    except ValueError:
        outcome = "refused"
    except TooSlow:
        outcome = "TOO SLOW"
    except Exception as error:
        outcome = type(error).__name__.upper()
    finally:
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return outcome if grown < GROWTH_KIB else "TOO MUCH MEMORY"


def memories(folder: Path) -> list[tuple[TitansForCausalLM, bytes]]:
    """A model of every variant, and a memory file of each: inside a chunk and at its end."""
    found = []
    for variant in ("mac", "mag", "mal", "lmm"):
        for length in (37, 33):
            torch.manual_seed(0)
            model = TitansForCausalLM(
                TitansConfig(
                    variant=variant, vocab_size=256, hidden_size=16, intermediate_size=16,
                    num_hidden_layers=2, num_attention_heads=2, head_dim=8, memory_depth=2,
                    memory_expansion=2, chunk_size=8, segment_length=16, sliding_window=16,
                    num_persistent_tokens=2,
                )
            )  # fmt: skip
            session = Session(model)
            session.feed(np.random.default_rng(0).integers(0, 256, length))
            session.save(folder / "whole.memory")
            found.append((model, (folder / "whole.memory").read_bytes()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="files (default 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-failures"), help="folder for what was not refused"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, _stop)
    torch.set_num_threads(1)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        path, wholes = Path(name) / "mutated.memory", memories(Path(name))
        for number in range(arguments.count):
            generator = np.random.default_rng([arguments.seed, number])
            model, content = wholes[number % len(wholes)]
            sealed = number % 3 == 0
            mutation = (SEALED if sealed else PLAIN)[
                int(generator.integers(len(SEALED if sealed else PLAIN)))
            ]
            path.write_bytes(mutation(content, generator))
            kind = mutation.__name__.replace("_", " ")
            if sealed:
                kind += ", with a right checksum"
                seal(path)
            outcome = tried(path, model)
            counts[kind, outcome] += 1
            if outcome != "refused":
                failures += 1
                arguments.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, arguments.keep / f"{arguments.seed}-{number}.memory")
    print("| altered | outcome | files |\n|---|---|---:|")
    for (kind, outcome), count in sorted(counts.items()):
        print(f"| {kind} | {outcome} | {count:,} |")
    print(
        f"\n{arguments.count:,} files in {time.perf_counter() - began:.0f} s; {failures} not refused cleanly"
        + (f", kept in {arguments.keep}" if failures else "")
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
