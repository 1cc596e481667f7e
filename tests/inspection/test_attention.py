"""Attention in a model's layers reads what section 4 of the paper and docs/how/attention.md state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from titans import TitansConfig, TitansForCausalLM
from titans.inspection import draw_seen_keys, seen_keys

LENGTH, SPAN, PERSISTENT = 20, 8, 3
QUERY, KEY = np.arange(LENGTH)[:, None], np.arange(LENGTH)
CAUSAL = QUERY >= KEY
IN_SEGMENT = CAUSAL & (QUERY // SPAN == KEY // SPAN)
IN_WINDOW = CAUSAL & (QUERY - KEY < SPAN)
EXPECTED = {
    "mac": {"persistent": True, "context": IN_SEGMENT, "tokens": IN_SEGMENT},
    "mag": {"persistent": True, "tokens": IN_WINDOW},
    "mal": {"persistent": True, "tokens": IN_WINDOW},
    "window": {"tokens": IN_WINDOW},
    "transformer": {"tokens": CAUSAL},
}


def model(variant: str, num_layers: int = 2) -> TitansForCausalLM:
    config = TitansConfig(
        vocab_size=32,
        variant=variant,
        hidden_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        head_dim=8,
        segment_length=SPAN,
        sliding_window=SPAN,
        chunk_size=4,
        num_persistent_tokens=PERSISTENT,
    )
    return TitansForCausalLM(config).double()


@pytest.mark.parametrize("variant", EXPECTED)
def test_queries_read_what_the_paper_says(variant: str) -> None:
    for layer in seen_keys(model(variant), LENGTH):
        assert set(layer.seen) == set(EXPECTED[variant])
        for kind, expected in EXPECTED[variant].items():
            keys = PERSISTENT if kind == "persistent" else LENGTH
            np.testing.assert_array_equal(layer.seen[kind], np.broadcast_to(expected, (LENGTH, keys)))


def test_one_entry_a_layer_and_none_without_attention() -> None:
    assert [layer.layer for layer in seen_keys(model("mag"), 2)] == [
        f"model.layers.{index}.mixer.attention" for index in range(2)
    ]
    assert seen_keys(model("lmm"), 2) == []
    with pytest.raises(ValueError, match="num_tokens=0"):
        seen_keys(model("mag"), 0)


def test_a_picture_is_written(tmp_path: Path) -> None:
    (layer,) = seen_keys(model("mac", num_layers=1), LENGTH)
    draw_seen_keys(tmp_path / "mac.png", {"MAC": layer})
    assert (tmp_path / "mac.png").read_bytes().startswith(b"\x89PNG")
