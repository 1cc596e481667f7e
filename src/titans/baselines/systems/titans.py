"""Systems that are this library's own model with some block, or some setting of its memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from titans.baselines.systems.system import HEAD_DIM, Sizes, System
from titans.hf import TitansConfig

# Equations without anything for stability, and with weights that start at learned ones.
_PLAIN: dict[str, Any] = {
    "residual": False,
    "norm": False,
    "normalize_step": False,
    "length_floor": 0.0,
    "row_limit": None,
    "decay_to_initial": False,
    "max_momentum": 0.0,
}
# So long that in float32 nothing is forgotten, whatever the token.
_NO_FORGETTING = [1e30, 1e30]
_TTT = {**_PLAIN, "residual": True, "norm": True, "activation": "gelu"}


def titans(variant: str, sizes: Sizes, memory: dict[str, Any] | None = None, **fields: Any) -> TitansConfig:
    """The configuration of a variant; a deep memory is two layers, as in the paper."""
    usual: dict[str, Any] = dict(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        head_dim=HEAD_DIM,
        memory_depth=2,
        memory_expansion=2,
        memory=memory or {},
        segment_length=sizes.window,
        sliding_window=sizes.window,
        num_persistent_tokens=4,
    )
    return TitansConfig(variant=variant, **{**usual, **fields})


def _system(
    title: str, source: str, variant: str, memory: dict[str, Any] | None = None, **fields: Any
) -> System:
    return System(title, source, partial(titans, variant, memory=memory, **fields))


_PAPER = "arXiv 2501.00663"
_learner = partial(_system, variant="lmm", num_persistent_tokens=0)

SYSTEMS: dict[str, System] = {
    "lmm": _system("Titans (LMM)", _PAPER, "lmm"),
    "mac": _system("Titans (MAC)", _PAPER, "mac"),
    "mag": _system("Titans (MAG)", _PAPER, "mag"),
    "mal": _system("Titans (MAL)", _PAPER, "mal"),
    "lmm-linear": _system("Titans (LMM), linear memory", _PAPER, "lmm", memory_depth=1),
    "window": _system("Sliding window", "arXiv 1904.10509; attention alone", "window"),
    "lstm": _system("LSTM", "Hochreiter and Schmidhuber 1997; in blocks with SwiGLU", "lstm"),
    "rwkv7": _system("RWKV-7", "arXiv 2503.14456; its time mixing, in blocks with SwiGLU", "rwkv7"),
    "deltanet": _learner(
        "DeltaNet",
        "arXiv 2406.06484; docs/how/family.md",
        memory={"form": {**_PLAIN, "max_step_size": 0.5}, "half_lives": _NO_FORGETTING},
        memory_depth=1,
        chunk_size=1,
    ),
    "momentum-deltanet": _learner(
        "Momentum DeltaNet",
        "arXiv 2605.05838; docs/how/family.md, the gradient taken before forgetting",
        memory={"form": {**_PLAIN, "max_momentum": 0.9}},
        memory_depth=1,
        chunk_size=1,
    ),
    "ttt-linear": _learner(
        "TTT-Linear",
        "arXiv 2407.04620; docs/how/family.md",
        memory={"form": _TTT, "half_lives": _NO_FORGETTING},
        memory_depth=1,
    ),
    "ttt-mlp": _learner(
        "TTT-MLP",
        "arXiv 2407.04620; hidden width as of Titans here",
        memory={"form": _TTT, "half_lives": _NO_FORGETTING},
    ),
}
