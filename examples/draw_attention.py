"""Draw which keys each variant's attention reads, as measured by gradients.

python examples/draw_attention.py [attention.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from titans import TitansConfig, TitansForCausalLM
from titans.inspection import SeenKeys, draw_seen_keys, seen_keys

TITLES = {
    "mac": "MAC: what memory recalled, and the segment",
    "mag": "MAG: a window, in parallel with the memory",
    "mal": "MAL: a window, after the memory",
    "transformer": "transformer: everything before",
}


def attention_of(variant: str) -> SeenKeys:
    """One layer's, over 40 tokens with segments and windows of 16."""
    config = TitansConfig(
        vocab_size=64,
        variant=variant,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=16,
        segment_length=16,
        sliding_window=16,
        num_persistent_tokens=4,
    )
    return seen_keys(TitansForCausalLM(config).double(), 40)[0]


def main(path: str = "attention.png") -> None:
    draw_seen_keys(Path(path), {title: attention_of(variant) for variant, title in TITLES.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
