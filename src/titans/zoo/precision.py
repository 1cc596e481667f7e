"""The precision in which a model of transformers, or a graft's base, computes."""

from __future__ import annotations

from typing import Any, Literal, get_args

Precision = Literal["auto", "float32", "bfloat16"]
# Products of smaller models are too short for the precision to matter.
_LARGE = 20_000_000


def convert(model: Any, dtype: Any) -> None:
    """Convert a model of transformers in place, as if it had been loaded in this dtype.

    `model.to` would also round what is never saved, such as the frequencies of rotary positions: in bfloat16
    by up to 0.3 %, which after 300 tokens is an angle of one radian.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        setattr(module, name, buffer)


def set_precision(model: Any, precision: Precision) -> str | None:
    """Convert a model of transformers, or a graft's base; memories keep float32.

    auto: on a CPU with matrix tiles for bfloat16 (Intel AMX) large models get bfloat16, on other CPUs
    float32: without tiles products in bfloat16 are slower (oneDNN with AVX-512-BF16 alone takes 1.5 times as
    long as in float32). Titans models, small models and those on a GPU keep theirs.

    Returns what auto chose and why, None where nothing was chosen or changed.

    Raises:
        ValueError: for an unknown precision, or another than float32 of a Titans model.
    """
    import torch

    if precision not in get_args(Precision):
        raise ValueError(f"dtype={precision!r}: give one of {', '.join(get_args(Precision))}")
    if model.config.model_type == "titans":
        if precision == "bfloat16":
            raise ValueError("dtype=bfloat16: a Titans model computes in float32; leave it out")
        return None
    base = model.base if model.config.model_type == "titans-graft" else model
    if precision != "auto":
        convert(base, getattr(torch, precision))
        return None
    if base.device.type != "cpu" or base.num_parameters() < _LARGE:
        return None
    tiles = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    wanted = torch.bfloat16 if tiles else torch.float32
    if base.dtype == wanted:
        return None
    convert(base, wanted)
    name = str(wanted).removeprefix("torch.")
    return f"{name}, because this processor {'has' if tiles else 'has no'} matrix tiles"
