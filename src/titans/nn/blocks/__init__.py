"""Token-mixing blocks. To add a variant, write one file and add one entry; the conformance tests then cover
it.

A block is built from `BlockSettings`, makes its own fresh state with `initial_state(batch)`, and maps
(x, state, context) to (x, state): norms and residuals are its own, the SwiGLU that follows is the model's.
`fresh_context(state)` is an initial state that keeps what the long-term memory has learned, and nothing else.
"""

from titans.nn.blocks.attention import AttentionBlock
from titans.nn.blocks.lmm import LMMBlock
from titans.nn.blocks.mac import MACBlock
from titans.nn.blocks.mag import MAGBlock
from titans.nn.blocks.mal import MALBlock
from titans.nn.blocks.settings import BlockContext, BlockSettings
from titans.nn.blocks.window import WindowBlock

BLOCKS = {
    "mac": MACBlock,
    "mag": MAGBlock,
    "mal": MALBlock,
    "lmm": LMMBlock,
    "transformer": AttentionBlock,
    "window": WindowBlock,
}
# Baselines.
WITHOUT_MEMORY = frozenset({"transformer", "window"})

__all__ = ["BLOCKS", "WITHOUT_MEMORY", "BlockContext", "BlockSettings"]
