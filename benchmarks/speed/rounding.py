"""What rounding the operands of matrix products to bfloat16 costs: `python benchmarks/speed/rounding.py`

Relative errors, ‖found − exact‖ / ‖exact‖, of backend native_bfloat16 compared with native in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory import MemoryNetwork, MemoryState, memory_scan

HEADS, HEAD_DIM, TIME = 4, 64, 4096
NAMES = ("queries", "keys", "values", "forget", "momentum", "step_size")


def run(backend: str, chunk_size: int) -> dict[str, Tensor]:
    """Reads, weights afterwards, and gradients of what went in."""
    torch.manual_seed(0)
    net = MemoryNetwork(HEAD_DIM, 2, 4, "silu", residual=False, norm=False)
    shape = (1, TIME, HEADS)
    leaves = [F.normalize(torch.randn(*shape, HEAD_DIM), dim=-1) for _ in range(3)]
    leaves += [high * torch.rand(*shape, 2) for high in (1e-4, 0.5, 0.5 / chunk_size)]
    weights = [torch.randn(1, HEADS, *s) / s[1] ** 0.5 for s in net.weight_shapes]
    for leaf in (*leaves, *weights):
        leaf.requires_grad_()
    reads, state = memory_scan(net, *leaves, MemoryState.initial(weights), chunk_size, backend=backend)
    found = {"reads": reads} | {f"weights {layer + 1}, after": w for layer, w in enumerate(state.weights)}
    gradients = torch.autograd.grad(reads.square().mean(), (*leaves, *weights))
    names = [*NAMES, *(f"weights {layer + 1}, before" for layer in range(len(weights)))]
    return found | {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)}


def main() -> None:
    """Print the table."""
    columns = []
    for chunk_size in (16, 64):
        exact, rounded = (run(backend, chunk_size) for backend in ("native", "native_bfloat16"))
        columns.append({name: ((rounded[name] - x).norm() / x.norm()).item() for name, x in exact.items()})
    print(f"{TIME} tokens, {HEADS} heads × {HEAD_DIM}, expansion 4\n")
    print("| | chunk 16 | chunk 64 |\n| --- | --- | --- |")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.1e}" for column in columns) + " |")


if __name__ == "__main__":
    main()
