"""Which tile is fastest? Barriers and instructions of a chunk by hidden units at a time and warps.

    python benchmarks/triton_tiles.py            # counted in the machine code for sm_90, without a GPU
    python benchmarks/triton_tiles.py --taken    # only what the library takes, in two precisions
    python benchmarks/triton_tiles.py --timed    # and timed, on a CUDA device

A kernel's chunk is a chain: what a barrier waits for, and what four schedulers issue. Predicted: 150 cycles
for a barrier with all around it, and instructions at one a cycle and scheduler, at 1.75 GHz.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from gpu_layers import layer_milliseconds, problem
from gpu_layers import scan as read
from triton_kernels import SCAN, built, run_tool

from titans.memory import InnerProblem, MemoryNetwork, MomentumRule
from titans.memory.backends.triton import backward, forward, resident, scan

BARRIER_CYCLES, SCHEDULERS, MEGAHERTZ = 150, 4, 1750
# Programs that fill an H100 all but four processors.
PROGRAMS, CHUNKS = 128, 128
SHAPES = ((64, 128, 16), (64, 256, 16), (64, 256, 64))
BLOCKS, WARPS = (32, 64, 128, 256), (4, 8)
PRECISIONS = ("tf32", "tf32x3")


class Counts(NamedTuple):
    """What a warp does in a chunk."""

    instructions: float
    barriers: float
    spills: float
    # The rest is of the whole program. Products of warp groups (HGMMA) and of warps (HMMA), by
    # rows × columns × length.
    products: str
    registers: int
    shared: int

    def microseconds(self, warps: int) -> float:
        cycles = self.barriers * BARRIER_CYCLES + self.instructions * warps / SCHEDULERS
        return cycles / MEGAHERTZ


def counted(kernel: Any, constants: dict[str, Any], warps: int) -> Counts:
    """Of the loop over chunks, whose inner loops run once for each block of hidden units."""
    program = built(kernel, constants, 90, warps)
    text = run_tool("nvdisasm", program.asm["cubin"], "-c")
    code, loops = parsed(text)
    outer = max(loops, key=len)
    times = {i: 1 for i in outer}
    for inner in loops:
        if inner != outer and inner.start >= outer.start and inner.stop <= outer.stop:
            times |= dict.fromkeys(inner, constants["HIDDEN"] // constants["BLOCK"])

    def total(*operations: str) -> float:
        return sum(n for i, n in times.items() if not operations or code[i] in operations)

    found = collections.Counter(re.findall(r"HG?MMA\.[0-9x]+", text))
    products = ", ".join(f"{n} {name.replace('.', ' ')}" for name, n in sorted(found.items()))
    used = re.search(r"REG:(\d+)", run_tool("cuobjdump", program.asm["cubin"], "-res-usage"))
    assert used is not None
    return Counts(total(), total("BAR"), total("LDL", "STL"), products, int(used[1]), program.metadata.shared)


def parsed(text: str) -> tuple[list[str], list[range]]:
    """Operations in order, and the loops among them: from the label that a branch goes back to, to it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\S+?)[.\s;](.*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if instruction[1] == "BRA" and target and labels.get(target[1], len(code)) < len(code):
                loops.append(range(labels[target[1]], len(code) + 1))
            code.append(instruction[1])
    return code, loops


class Shape:
    """A layer on the device, with a processor for almost every program, and what the torch path reads."""

    def __init__(self, dim: int, hidden: int, chunk: int) -> None:
        self.inner = InnerProblem(
            MemoryNetwork(dim, 2, hidden // dim, activation="silu", residual=False, norm=False),
            rule=MomentumRule(normalize_step=True, row_limit=8.0),
        )
        self.chunk = chunk
        self.tensors = problem(self.inner, PROGRAMS // 2, CHUNKS * chunk, 2, torch.float32, "cuda")
        self.exact = self._reads("chunkwise")

    @torch.no_grad()
    def _reads(self, backend: str) -> torch.Tensor:
        return read(self.inner, self.tensors, self.chunk, backend)

    def timed(self, block: int | None, warps: int) -> tuple[float, float, str]:
        """Microseconds of a chunk, forward and backward, and by how much the reads are off.

        block: None to go forward with the state in registers, and backward as the library does.
        """
        before = scan.block_of, scan.fits_registers, scan._WARPS, scan.forward_tile
        scan.fits_registers, scan._WARPS = lambda *_: block is None, warps
        if block is not None:
            scan.block_of, scan.forward_tile = lambda *_: block, lambda *_: scan.Tile(block, warps)
        try:
            ahead, both = layer_milliseconds(self.inner, self.tensors, self.chunk, "triton")
            error = float((self._reads("triton") - self.exact).abs().max() / self.exact.abs().max())
        finally:
            scan.block_of, scan.fits_registers, scan._WARPS, scan.forward_tile = before
        verdict = f"{error:.0e}{'' if error < 2e-2 else ' WRONG'}"
        return 1000 * ahead / CHUNKS, 1000 * (both - ahead) / CHUNKS, verdict


def row(
    kernel: Any, dim: int, hidden: int, chunk: int, precision: str, block: int | None, warps: int,
    measured: float | None = None, verdict: str = "",
) -> str:  # fmt: skip
    """block: None for the kernel that keeps the state in registers."""
    sizes = dict(SCAN, DEPTH=2, DIM=dim, HIDDEN=hidden, CHUNK=chunk, BLOCK=block or hidden)
    counts = counted(kernel, sizes | dict(PRECISION=precision, TAPE=True, KEEP=False), warps)
    is_taken = (kernel, block, warps) in taken(dim, hidden, chunk, precision)
    return (
        f"| {'backward' if kernel is backward.backward_kernel else 'forward'} | {dim} × {hidden} | {chunk} "
        f"| {precision} | {block or 'all, in registers'}{' *' if is_taken else ''} | {warps} "
        f"| {counts.instructions:,.0f} | {counts.barriers:.0f} | {counts.spills:,.0f} | {counts.registers} "
        f"| {counts.shared:,} | {counts.products} | {counts.microseconds(warps):.0f} "
        f"| {'' if measured is None else f'{measured:.0f}'} | {verdict} |"
    )


def taken(dim: int, hidden: int, chunk: int, precision: str) -> list[tuple[Any, int | None, int]]:
    """Kernels, hidden units at a time and warps, as the library has them on an H100."""
    forth: tuple[Any, int | None, int] = (
        forward.forward_kernel, *scan.forward_tile(chunk, dim, hidden, precision, True)
    )  # fmt: skip
    if scan.fits_registers(chunk, dim, hidden, precision):
        forth = (resident.resident_kernel, None, scan._WARPS)
    return [forth, (backward.backward_kernel, scan.block_of(chunk, hidden), scan._WARPS)]


def taken_rows() -> Iterator[str]:
    for precision in PRECISIONS:
        for shape in SHAPES:
            for kernel, block, warps in taken(*shape, precision):
                yield row(kernel, *shape, precision, block, warps)


def rows(is_timed: bool) -> Iterator[str]:
    for shape in SHAPES:
        layer = Shape(*shape) if is_timed else None
        blocks: list[int | None] = [block for block in BLOCKS if block <= shape[1]]
        fits = scan.fits_registers(shape[2], *shape[:2], "tf32")
        for block in (*blocks, *([None] if fits else [])):
            for warps in WARPS:
                *took, verdict = (None, None, "") if layer is None else layer.timed(block, warps)
                if block is None:
                    yield row(resident.resident_kernel, *shape, "tf32", block, warps, took[0], verdict)
                    continue
                yield row(forward.forward_kernel, *shape, "tf32", block, warps, took[0], verdict)
                yield row(backward.backward_kernel, *shape, "tf32", block, warps, took[1], verdict)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timed", action="store_true", help=f"on a CUDA device, {PROGRAMS} programs")
    parser.add_argument("--taken", action="store_true", help="only what the library takes, counted")
    arguments = parser.parse_args()
    if arguments.timed and not torch.cuda.is_available():
        parser.error("--timed: there is no CUDA device here")
    torch.set_float32_matmul_precision("high")
    option = " --timed" if arguments.timed else " --taken" if arguments.taken else ""
    device = f", {torch.cuda.get_device_name()}" if arguments.timed else ""
    print(
        f"{datetime.date.today()}, triton {triton.__version__}, sm_90{device}; "
        f"`python benchmarks/triton_tiles.py{option}`; of a warp and chunk; products, registers and bytes of "
        "shared memory of the program; * is what the library takes\n\n"
        "| kernel | head_dim × hidden | chunk | products in | hidden at a time | warps | instructions "
        "| barriers | of local memory | registers | shared memory | products | µs, predicted | µs "
        "| error of reads |\n" + "|---" * 15 + "|"
    )
    for line in taken_rows() if arguments.taken else rows(arguments.timed):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
