"""The sizes that a Titans model comes in, as fields of `TitansConfig`.

Memories are linear, as `TitansConfig` has them; `memory_expansion` is that of deeper ones, such as the models
in the zoo have (`memory_depth=2`).
"""

from __future__ import annotations

from typing import Any


def _paper(num_layers: int, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    return dict(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=hidden_size // 64,
    )


_BYTES = dict(vocab_size=256, chunk_size=16, segment_length=64, sliding_window=64, num_persistent_tokens=4)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        **_BYTES,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=2,
        memory_expansion=2,
    ),
    "small": dict(
        **_BYTES, hidden_size=256, intermediate_size=704, num_hidden_layers=7, num_attention_heads=4
    ),
    # The paper's sizes (camera-ready, appendix E); the width of the SwiGLU is not given there.
    "170m": _paper(12, 768, 2048),
    "340m": _paper(24, 1024, 2752),
    "760m": _paper(24, 1536, 4096),
    "1.3b": _paper(18, 2048, 5504),
}

# The paper's where it gives one.
PEAK_LEARNING_RATES = {
    "tiny": 3e-3, "small": 3e-3, "170m": 3e-3, "340m": 1.5e-3, "760m": 1.25e-3, "1.3b": 7e-4,
}  # fmt: skip
