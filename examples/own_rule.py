"""An update rule of one's own: a class, a registration, a check against the oracle, and what it does.

    python examples/own_rule.py

The rule is gradient descent with momentum and forgetting, as in the paper. In addition it shrinks every
weight a little at the end of each chunk: the step of an L1 penalty, which sets small weights to exactly 0.
docs/guides/extend.md describes everything that a rule can change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize

from titans import MemoryNetwork, MemoryState, NeuralMemory, memory_read, memory_scan
from titans.memory import UPDATE_RULES, InnerProblem, MomentumRule


@dataclass(frozen=True)
class Shrinking(MomentumRule):
    """w ← sign(w) max(|w| − shrink, 0) at every chunk's end."""

    shrink: float = 0.01

    def end(self, state: MemoryState) -> MemoryState:
        # Not in place: the oracle calls this at every token and discards most results.
        shrunk = tuple(w.sign() * (w.abs() - self.shrink).clamp_min(0) for w in state.weights)
        return super().end(replace(state, weights=shrunk))


def check_against_the_oracle() -> float:
    """The largest difference of the fast path from the oracle, in float64, over a call of uneven length."""
    torch.manual_seed(0)
    memory = NeuralMemory(64, 2, 32, rule={"name": "shrinking", "shrink": 1e-3}).double()
    x = torch.randn(2, 100, 64, dtype=torch.float64)
    memory.backend = "chunkwise"
    fast, _ = memory(x)
    memory.backend = "reference"
    oracle, _ = memory(x)
    return (fast - oracle).abs().max().item()


def store_pairs(rule: MomentumRule, pairs: int = 32, dim: int = 64) -> tuple[float, float]:
    """Write random pairs one by one: the relative error of the answers, and the share of weights at 0."""
    torch.manual_seed(0)
    keys = normalize(torch.randn(1, pairs, 1, dim, dtype=torch.float64), dim=-1)
    values = torch.randn(1, pairs, 1, dim, dtype=torch.float64)
    zero, half = torch.zeros_like(keys[..., :1]), torch.full_like(keys[..., :1], 0.5)
    inner = InnerProblem(MemoryNetwork(dim, depth=1, residual=False, norm=False), rule=rule)
    state = inner.initial_state([torch.zeros(1, 1, dim, dim, dtype=torch.float64)])
    # A step of 1/2 along the gradient 2 (W k − v) kᵀ: afterwards W k = v. Chunks of one token.
    _, state = memory_scan(inner, keys, keys, values, zero, zero, half, state, chunk_size=1)
    answers = memory_read(inner, keys, state)
    error = (answers - values).norm() / values.norm()
    return error.item(), (state.weights[0] == 0).double().mean().item()


def main() -> None:
    UPDATE_RULES["shrinking"] = Shrinking  # now a name in layers, models, checkpoints and memory files
    print(f"differs from the oracle by {check_against_the_oracle():.0e}")
    for name, rule in (
        ("momentum", MomentumRule()),
        ("shrinking", Shrinking(shrink=0.001)),
        ("shrinking more", Shrinking(shrink=0.01)),
    ):
        error, zeros = store_pairs(rule)
        print(f"{name:15} error of 32 answers {error:.3f}, weights that are 0: {100 * zeros:.1f} %")


if __name__ == "__main__":
    main()
