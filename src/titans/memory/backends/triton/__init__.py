"""The fast path on a GPU: one kernel forward and one backward, each from a row's first chunk to its last.

The algorithm is that of `chunkwise/chunk.py`, for the networks and chunks that `refuses` lets through
(`forward.py`, `backward.py`, launched by `scan.py`). A few tokens that need no gradient have a kernel of
their own, `decode.py`. Needs the package triton.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from titans.memory.backends.known import refuses_parts
from titans.memory.checks import hand_written_refuses
from titans.memory.chunkwise.scan import chunkwise_scan, scan_laid_out
from titans.memory.network import MemoryNetwork
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState

__all__ = ["refuses", "triton_scan"]

# The longest stretch that is decoded token by token. A longer one may have chunks in it.
FEW_TOKENS = 8
LONGEST_CHUNK = 64
# Bytes of shared memory in which any chunk has room, and tokens · head_dim that need no more than 99 KiB.
AMPLE_MEMORY, SMALL_TILE = 160 * 1024, 32 * 64
_INSTALLED = find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(problem: ScanProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    net, keys = problem.inner.network, problem.keys
    if not _INSTALLED:
        return "the package triton is not installed: pip install 'titans-ltm[triton]'"
    if keys.device.type != "cuda" and not interpreted():
        return f"it runs on a CUDA device, and the tensors are on {keys.device}"
    if not interpreted() and not _is_new_enough(keys.device):
        return "it needs a GPU with tensor cores for tf32 (compute capability 8.0)"
    if reason := refuses_parts(problem):
        return reason
    if keys.dtype == torch.float64 and not interpreted():
        return "it computes in float32, and the problem is in float64"
    if reason := hand_written_refuses():
        return reason
    if decodes(problem):
        return None
    memory = AMPLE_MEMORY
    if not interpreted():
        device = torch.cuda.get_device_properties(keys.device)
        memory = getattr(device, "shared_memory_per_block_optin", AMPLE_MEMORY)
    if problem.chunk_size > LONGEST_CHUNK:
        return f"chunk_size is {problem.chunk_size}: it knows chunks of up to {LONGEST_CHUNK}"
    return _refuses_shape(net) or _refuses_tile(problem.chunk_size, net.head_dim, memory)


def _refuses_shape(net: MemoryNetwork) -> str | None:
    if net.depth > 2:
        return f"it knows networks of depth 1 and 2, not {net.depth}"
    if net.depth == 2 and net.input_dim != net.head_dim:
        return f"key_dim is {net.key_dim} and head_dim {net.head_dim}: at depth 2 it knows equal widths"
    inner = "key_dim" if net.depth == 1 else "head_dim · expansion"
    for name, size, most in (("head_dim", net.head_dim, 128), (inner, net.weight_shapes[-1][1], 512)):
        if not _is_power_of_two(size, most):
            return f"{name} is {size}: it knows powers of two from 16 to {most}"
    return None


def _refuses_tile(chunk_size: int, head_dim: int, memory: int) -> str | None:
    """memory: bytes of shared memory that a block of the device may have."""
    tokens = max(16, 1 << (chunk_size - 1).bit_length())
    if memory >= AMPLE_MEMORY or tokens * head_dim <= SMALL_TILE:
        return None
    return (
        f"chunk_size is {chunk_size} and head_dim {head_dim}: with {memory // 1024} KiB of shared memory it "
        f"knows chunks of up to {SMALL_TILE // head_dim} tokens"
    )


def decodes(problem: ScanProblem) -> bool:
    """Whether the kernel for single tokens runs a problem that the device can: any chunk, mask and resets."""
    return (
        1 <= problem.keys.shape[1] <= FEW_TOKENS
        and not problem.needs_grad
        # Tangents would be lost without a word.
        and torch.autograd.forward_ad._current_level < 0
        and not problem.read_anchor
        and _refuses_shape(problem.inner.network) is None
    )


def _is_power_of_two(size: int, most: int) -> bool:
    """From 16 on, the smallest tile of a tensor core."""
    return 16 <= size <= most and not size & (size - 1)


def runs_on(x: Tensor) -> bool:
    """Whether kernels other than the scan's take this tensor: float32 on a CUDA device, not in torch.func."""
    return (
        x.device.type == "cuda"
        and x.dtype == torch.float32
        and _INSTALLED
        and _is_new_enough(x.device)
        and hand_written_refuses() is None
    )


def _is_new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def triton_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    if decodes(problem):
        from titans.memory.backends.triton.decode import decode

        return decode(problem)

    if torch.autograd.forward_ad._current_level >= 0:
        # The kernels have no tangents.
        return chunkwise_scan(problem)
    from titans.memory.backends.triton.scan import scan

    return scan_laid_out(problem, scan)
