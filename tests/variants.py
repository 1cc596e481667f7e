"""The variants that tests of whole models run on.

Without Hope, which has several memories in a layer: what holds for a whole model of it, and of memories with
other schedules, is in hf/test_schedules.py, in fewer and shorter tests, because the suite has minutes.
Without the LSTM and RWKV-7, baselines: baselines/test_systems.py has them. tests/nn/test_blocks.py has every
block.
"""

from __future__ import annotations

from typing import Any

from titans.nn.blocks import BLOCKS

VARIANTS = [variant for variant in BLOCKS if variant not in ("hope", "lstm", "rwkv7")]
# For what is the same code whatever the variant: a memory read in segments, one next to a window, and a state
# that grows. That a text may be cut anywhere is tested with all.
DIFFERENT = ["mac", "mag", "transformer"]

# Memories that are updated or kept by a schedule of their own: the variant, and what its configuration says.
# Sizes are for the models of hf/models.py, whose chunks have 3 tokens.
LOCAL = {"local_chunk_sizes": [2, 4], "shard_length": 8}
CACHING = {"every": 6, "keep": "log"}
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"local {variant}": (variant, {"chunk_size": 9, "memory": LOCAL}) for variant in ("lmm", "mag", "mal")
    },
    **{f"cached {name}": (name, {"memory": {"caching": CACHING}}) for name in ("lmm", "mal")},
    **{
        f"cached {name}": (name, {"memory": {"caching": {**CACHING, "keep": "linear"}}})
        for name in ("mac", "mag")
    },
    "hope": ("hope", {"memory": {"periods": [3, 7]}}),
}
# For what these share: local memories, and the two that differ most from them and from each other.
DIFFERENT_SCHEDULES = ["local mag", "cached mac", "hope"]
