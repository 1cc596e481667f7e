"""Compile the Triton kernels ahead of time, without a GPU: registers, spills and shared memory of each.

    python benchmarks/triton_kernels.py                # sm_90, and some for sm_80; ten minutes
    python benchmarks/triton_kernels.py --precision bf16

Needs the package triton (in the extra dev), whose ptxas is used.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans.memory.backends.triton import backward, decode, forward, resident, scan
from titans.nn.kernels import filter as filters

TYPES = {
    "mask": "*u8", "reset": "*u8", "fresh": "*u8", "complete": "*u8", "anchor_slot": "*i32",
    "position": "*i64", "new_position": "*i64",
} | dict.fromkeys(
    (
        "num_chunks", "num_rows", "num_units", "group", "from_time", "time", "channels", "heads",
        "chunk_size",
    ),
    "i32",
)  # fmt: skip
MEMORY = dict(
    HAS_BASE=True, RESIDUAL=False, NORMALIZE=True, RESCALE=True, FLOOR=1.0, RADIUS=8.0, EPS=1e-5, NORM=False,
    ACTIVATION=1, OBJECTIVE=0, PARAMETER=0.0,
)  # fmt: skip
SCAN = dict(MEMORY, MARKED=False)
# depth, head_dim, hidden width, tokens in a chunk, more.
SHAPES = (
    (2, 64, 128, 16, {}),
    (2, 64, 128, 16, dict(NORM=True, RESIDUAL=True, MARKED=True)),
    (2, 64, 256, 16, {}),
    (2, 128, 256, 16, {}),
    (2, 64, 256, 32, {}),
    (2, 64, 256, 64, {}),
    (1, 64, 64, 16, {}),
    (1, 128, 128, 16, {}),
    (2, 64, 128, 16, dict(ACTIVATION=2)),
    (1, 64, 256, 16, {}),
    (1, 128, 512, 64, {}),
)
# depth, head_dim, hidden width, more.
DECODED = (
    (1, 64, 64, {}),
    (1, 128, 128, {}),
    (1, 64, 256, {}),
    (2, 64, 128, {}),
    (2, 64, 128, dict(ACTIVATION=2)),
    (2, 64, 128, dict(NORM=True, RESIDUAL=True)),
    (2, 64, 256, {}),
    (2, 128, 512, {}),
    (2, 128, 512, dict(NORM=True, RESIDUAL=True)),
)
FILTER = dict(WIDTH=16, CHANNELS=64)


def built(kernel: Any, constants: dict[str, Any], capability: int, warps: int) -> Any:
    """A kernel compiled by Triton for a target that need not be there. constants: with more than it has."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    kind = {name: TYPES.get(name, "*fp32") for name in names} | {n: "constexpr" for n in constants}
    return triton.compile(
        ASTSource(
            kernel,
            {name: kind[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kind[name][0] == "*"},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )


def run_tool(name: str, source: bytes, *options: str) -> str:
    """The output, on a file, of a program that comes with triton."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(source)
        file.flush()
        command = [program, *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def label(option: tuple[str, Any]) -> str:
    """An option and its value, as a row of the table names them."""
    name, value = option
    return name.lower() if value is True else f"{name.lower()} {value}"


def compiled(kernel: Any, constants: dict[str, Any], capability: int, warps: int) -> tuple[str, ...]:
    """Registers, bytes spilled (stores, loads) and bytes of shared memory of a kernel."""
    code = built(kernel, constants, capability, warps)
    architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
    said = run_tool("ptxas", code.asm["ptx"].encode(), "-v", f"-arch={architecture}", "-o", "/dev/null")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills is not None and registers is not None, said
    return registers[1], spills[1], spills[2], f"{code.metadata.shared:,}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precision", default="tf32", choices=["bf16", "tf32", "tf32x3"], help="of matrix products"
    )
    arguments = parser.parse_args()
    print(
        f"{datetime.date.today()}, triton {triton.__version__}; `python benchmarks/triton_kernels.py`; "
        f"{arguments.precision}, 8 warps (filters 4, forward as in `forward_tile`); scan in chunks; "
        "decoding one token, or a few with masks and resets\n\n"
        "| kernel | target | head_dim × hidden | registers | spill stores | spill loads | shared memory |\n"
        "|---|---|---|---|---|---|---|"
    )
    for capability in (90, 80):
        for depth, dim, hidden, chunk, options in SHAPES if capability == 90 else SHAPES[:1]:
            precision = arguments.precision
            sizes = dict(SCAN, DEPTH=depth, DIM=dim, HIDDEN=hidden, CHUNK=chunk) | options
            sizes |= dict(PRECISION=precision, TAPE=True, KEEP=False)
            tile = scan.forward_tile(chunk, dim, hidden, precision, capability == 90)
            tiles = {forward.forward_kernel: tile}
            kernels: list[Any] = [forward.forward_kernel, backward.backward_kernel]
            if capability == 90 and scan.fits_registers(chunk, dim, hidden, arguments.precision):
                kernels.append(resident.resident_kernel)
            for kernel in kernels:
                units, warps = tiles.get(kernel, scan.Tile(scan.block_of(chunk, hidden), 8))
                cells = compiled(kernel, dict(sizes, BLOCK=units), capability, warps)
                known = [label(option) for option in options.items() if option[0] in kernel.arg_names]
                what = ", ".join([kernel.__name__, f"depth {depth}", f"chunks of {chunk}", *known])
                print(f"| {what} | sm_{capability} | {dim} × {hidden} | {' | '.join(cells)} |", flush=True)
        for depth, dim, hidden, options in DECODED:
            sizes = dict(MEMORY, DEPTH=depth, DIM=dim, HIDDEN=hidden, BLOCK=min(decode.TILE // dim, hidden))
            for tokens, length in (
                ("1 token", dict(time=1, HAS_MASK=False, HAS_RESET=False)),
                ("a few", dict(HAS_MASK=True, HAS_RESET=True)),
            ):
                cells = compiled(decode.decode_kernel, {**sizes, **options, **length}, capability, 8)
                name = f"decode_kernel, depth {depth}, {tokens}" + "".join(
                    f", {label(o)}" for o in options.items()
                )
                print(f"| {name} | sm_{capability} | {dim} × {hidden} | {' | '.join(cells)} |", flush=True)
        for kernel, more in (
            (filters._filter_kernel, dict(REVERSED=False, TIME=filters._TIME)),
            (filters._weight_kernel, dict(PADDED=16, SPAN=filters._SPAN, AT_ONCE=filters._AT_ONCE)),
        ):
            cells = compiled(kernel, {**FILTER, **more}, capability, 4)
            print(f"| {kernel.__name__} | sm_{capability} | – | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
