"""The variants that tests of whole models run on.

Without Hope, which has several memories in a layer: what holds for a whole model of it is in
hf/test_caching_and_hope.py, in fewer and shorter tests, because the suite has minutes. Without the LSTM and
RWKV-7, baselines: baselines/test_systems.py has them. tests/nn/test_blocks.py has every block.
"""

from __future__ import annotations

from titans.nn.blocks import BLOCKS

VARIANTS = [variant for variant in BLOCKS if variant not in ("hope", "lstm", "rwkv7")]
# For what is the same code whatever the variant: a memory read in segments, one next to a window, and a state
# that grows. That a text may be cut anywhere is tested with all.
DIFFERENT = ["mac", "mag", "transformer"]
