"""Token-mixing blocks. To add a variant, write one file and add one entry; conformance tests then cover it.

`Block` says what a block is: built from `BlockSettings`, it makes a state with `initial_state(batch)`, maps
(x, state, context) to a `BlockResult` (x, state, trace), and `fresh_context(state)` keeps of a state the
memory alone. Norms and residuals are the block's own, the SwiGLU that follows is the model's.
"""

from titans.nn.blocks.attention import AttentionBlock
from titans.nn.blocks.hope import HopeBlock
from titans.nn.blocks.lmm import LMMBlock
from titans.nn.blocks.lstm import LSTMBlock
from titans.nn.blocks.mac import MACBlock
from titans.nn.blocks.mag import MAGBlock
from titans.nn.blocks.mal import MALBlock
from titans.nn.blocks.protocol import Block, BlockResult
from titans.nn.blocks.rwkv7 import RWKV7Block
from titans.nn.blocks.settings import BlockSettings
from titans.nn.blocks.window import WindowBlock

BLOCKS = {
    "mac": MACBlock,
    "mag": MAGBlock,
    "mal": MALBlock,
    "lmm": LMMBlock,
    "hope": HopeBlock,
    "transformer": AttentionBlock,
    "window": WindowBlock,
    "lstm": LSTMBlock,
    "rwkv7": RWKV7Block,
}


def has_memory(variant: str) -> bool:
    """Whether blocks of that name have a long-term memory; those of baselines do not."""
    return getattr(BLOCKS[variant], "has_memory", True)


__all__ = ["BLOCKS", "Block", "BlockResult", "BlockSettings", "has_memory"]
