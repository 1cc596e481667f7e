"""The neural long-term memory: a small network per head whose weights are learned while the model reads.

Notation, here and in the paper (arXiv 2501.00663):

| here | paper | equation | shape |
|---|---|---|---|
| `queries` | q_t | (15) | (batch, time, heads, head_dim) |
| `keys`, `values` | k_t, v_t | (11) | (batch, time, heads, head_dim) |
| `forget` | α_t, the part forgotten | (13) | (batch, time, heads, depth) |
| `momentum` | η_t, past surprise kept | (14) | (batch, time, heads, depth) |
| `step_size` | θ_t | (14) | (batch, time, heads, depth) |
| `state.weights` | M_t | (13) | depth × (batch, heads, out, in) |
| `state.momentum` | S_t | (14) | depth × (batch, heads, out, in) |
| `state.anchor` | M_t', chunk start | (16) | depth × (batch, heads, out, in) |
| `state.position` | t | | (batch,) |
| `chunk_size` | b | (16) | |
| surprise | ‖M(k_t) − v_t‖² | (12) | (batch, time, heads) |

Read `reference.py` first: it is the method. `chunkwise/` is the same function, fast.
"""

from titans.memory.backends import BACKENDS, Backend
from titans.memory.chunkwise.columns import assume_aligned
from titans.memory.decay import decay_products
from titans.memory.inner import InnerProblem
from titans.memory.network import MemoryNetwork
from titans.memory.objectives import (
    OBJECTIVES,
    AdaptiveHuber,
    DotProduct,
    Huber,
    Lp,
    Objective,
    SquaredError,
    Yaad,
)
from titans.memory.rules import (
    UPDATE_RULES,
    Atlas,
    LaCT,
    Memora,
    MomentumRule,
    Moneta,
    Omega,
    UpdateRule,
)
from titans.memory.rules.coefficients import ChunkCoefficients
from titans.memory.scan import memory_read, memory_scan
from titans.memory.state import MemoryState

__all__ = [
    "BACKENDS",
    "OBJECTIVES",
    "UPDATE_RULES",
    "AdaptiveHuber",
    "Atlas",
    "Backend",
    "ChunkCoefficients",
    "DotProduct",
    "Huber",
    "InnerProblem",
    "LaCT",
    "Lp",
    "Memora",
    "MemoryNetwork",
    "MemoryState",
    "MomentumRule",
    "Moneta",
    "Objective",
    "Omega",
    "SquaredError",
    "UpdateRule",
    "Yaad",
    "assume_aligned",
    "decay_products",
    "memory_read",
    "memory_scan",
]
