"""Does the native backend compute the same on ARM? Compiled by a cross-compiler, run under emulation.

    apt-get install g++-aarch64-linux-gnu qemu-user
    pip download torch==2.13.0 --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --dest FOLDER
    python benchmarks/arm.py FOLDER/torch-*.whl

Records calls of the native operators on this machine, forward and backward, in float32 and float64, and
repeats them with the same sources compiled for ARMv8.2 (NEON). Prints the largest relative difference. An
emulator shows nothing of the speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from titans.memory import MemoryNetwork, MemoryState, memory_scan
from titans.memory.backends.native import missing
from titans.memory.backends.native.build import SOURCES, flags

PREFIX, EMULATOR, PROCESSOR = "aarch64-linux-gnu-", "qemu-aarch64", "neoverse-n1"
SYSTEM = Path("/usr/aarch64-linux-gnu")
# PyTorch's wheel for ARM is made for CUDA, too; on a CPU nothing of these is called.
EMPTY = ("libcudart.so.13", "libcupti.so.13")
# What PyTorch reads about the processor when it starts: it crashes on what this machine's files say.
MIDR = "0x00000000413fd0c1"
CPUINFO = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
NETWORKS: list[dict[str, Any]] = [
    dict(head_dim=16, depth=2, expansion=2, activation="gelu", residual=True, norm=True),
    dict(head_dim=20, depth=2, expansion=1, activation="silu", residual=False, norm=False),
    dict(head_dim=8, depth=1, residual=False, norm=False),
]


def recorded() -> list[tuple[str, tuple[Any, ...], list[Any]]]:
    """Name, arguments and results of the operators' calls in scans of random tokens, forward and backward."""
    calls: list[tuple[str, tuple[Any, ...], list[Any]]] = []
    operators: Any = torch.ops.titans_native

    def recording(name: str) -> Any:
        operator = getattr(operators, name)

        def call(*arguments: Any) -> Any:
            results = operator(*arguments)
            kept = tuple([*a] if isinstance(a, (list, tuple)) else a for a in arguments)
            calls.append((f"titans_native::{name}", kept, [*results]))
            return results

        return call

    for name in ("scan", "scan_backward"):
        setattr(operators, name, recording(name))
    torch.manual_seed(0)
    for settings in NETWORKS:
        for dtype in (torch.float32, torch.float64):
            for chunk_size in (16, 5):
                _scan(MemoryNetwork(**settings), chunk_size, dtype)
    return calls


def _scan(network: MemoryNetwork, chunk_size: int, dtype: torch.dtype) -> None:
    rows, time, heads, size, depth = 2, 37, 2, network.head_dim, network.depth
    hidden = size * network.expansion if depth > 1 else size
    widths = [size, *[hidden] * (depth - 1), size]
    weights = tuple(
        (0.3 * torch.randn(rows, heads, out, into, dtype=dtype)).requires_grad_()
        for into, out in pairwise(widths)
    )
    queries, keys, values = (
        torch.randn(rows, time, heads, size, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    gates = (share * torch.rand(rows, time, heads, depth, dtype=dtype) for share in (0.1, 0.5, 0.02))
    norm = dict(
        norm_weight=torch.ones(heads, size, dtype=dtype), norm_bias=torch.zeros(heads, size, dtype=dtype)
    )
    state = MemoryState.initial(weights)
    slow: dict[str, Any] = norm if network.norm else {}
    reads, _ = memory_scan(
        network, queries, keys, values, *gates, state, chunk_size, backend="native", **slow
    )
    reads.square().sum().backward()


def system_in(folder: Path) -> Path:
    """A folder that the emulated program sees instead of this machine's files."""
    root = folder / "system"
    (root / "proc").mkdir(parents=True)
    (root / "lib").symlink_to(SYSTEM / "lib")
    count = os.cpu_count() or 1
    processors = [CPUINFO.replace(": 0\n", f": {number}\n", 1) for number in range(count)]
    (root / "proc" / "cpuinfo").write_text("".join(processors))
    for number in range(count):
        place = root / f"sys/devices/system/cpu/cpu{number}/regs/identification"
        place.mkdir(parents=True)
        (place / "midr_el1").write_text(f"{MIDR}\n")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="PyTorch's wheel for aarch64, of the version here")
    wheel = parser.parse_args().wheel
    if reason := missing():
        raise SystemExit(f"the native backend is not here: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.save(recorded(), folder / "calls.pt")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".so" in name and "cuda" not in name]
            archive.extractall(folder, names)
        libraries = folder / "torch" / "lib"
        for name in EMPTY:
            _run(f"{PREFIX}gcc", "-shared", f"-Wl,-soname,{name}", "-o", libraries / name, "-xc", "/dev/null")
        # This torch's headers fit the other's libraries: they are of one version.
        kept = [
            flag for flag in flags("armv8.2-a", "DEFAULT") if not flag.startswith(("-shared", "-L", "-l"))
        ]
        program = folder / "calls"
        _run(
            f"{PREFIX}g++", *kept, Path(__file__).with_suffix(".cpp"), *sorted(SOURCES.glob("*.cpp")),
            "-o", program, f"-L{libraries}", "-ltorch_cpu", "-lc10", "-Wl,--allow-shlib-undefined",
        )  # fmt: skip
        environment = f"LD_LIBRARY_PATH={libraries},OMP_NUM_THREADS=1"
        return _run(
            EMULATOR, "-cpu", PROCESSOR, "-L", system_in(folder), "-E", environment, program,
            folder / "calls.pt", check=False,
        )  # fmt: skip


def _run(*command: str | Path, check: bool = True) -> int:
    return subprocess.run([*map(str, command)], check=check).returncode


if __name__ == "__main__":
    raise SystemExit(main())
