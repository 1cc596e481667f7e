"""Which weights a memory or a graft belongs to: a name for them, and a sample to compare other precisions; a
name for a tokenizer's vocabulary."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Values of each parameter by which weights are recognised in another precision.
_SAMPLE = 8


def weights_name(model: nn.Module) -> str:
    """A short name for the weights: sha256 over 64 values of every parameter, rounded to bfloat16.

    Rounded, so that a checkpoint keeps its name when it is loaded in bfloat16 or float64; float16 may change
    a value that lies between two of bfloat16, for which there is `same_weights`.
    """
    digest = hashlib.sha256()
    for name, values, shape in _samples(model, 64):
        digest.update(f"{name}{shape}".encode())
        rounded = values.to(torch.bfloat16).contiguous()
        digest.update(bytes(rounded.view(torch.uint8).tolist()))
    return digest.hexdigest()[:32]


def weights_sample(model: nn.Module) -> str:
    """Up to 8 values of every parameter and their type, as text for a file's header; see `same_weights`."""
    parts = list(_samples(model, _SAMPLE))
    values = torch.cat([values for _, values, _ in parts]).to(torch.float32)
    encoded = base64.b64encode(values.numpy().tobytes()).decode()
    precision = max(_epsilon(values.dtype) for _, values, _ in parts)
    return json.dumps({"of": weights_name(model), "values": encoded, "precision": precision})


def same_weights(model: nn.Module, name: str, sample: str) -> bool:
    """Whether a sample that was written with a fingerprint is of this model, in whatever precision either is.

    Raises:
        ValueError: if it is no sample.
    """
    fields = json.loads(sample)
    content, precision = base64.b64decode(fields["values"], validate=True), float(fields["precision"])
    if len(content) % 4 or fields["of"] != name:
        raise ValueError("it holds no float32 values of that fingerprint")
    theirs = torch.frombuffer(bytearray(content), dtype=torch.float32) if content else torch.zeros(0)
    mine = torch.cat([values.to(torch.float32) for _, values, _ in _samples(model, _SAMPLE)])
    precision += max(_epsilon(values.dtype) for _, values, _ in _samples(model, _SAMPLE))
    # float16 has no finer steps than this one near 0.
    allowed = (
        precision * torch.maximum(mine.abs(), theirs.abs()) + 6e-8 if mine.shape == theirs.shape else mine
    )
    return mine.shape == theirs.shape and bool(((mine - theirs).abs() <= allowed).all())


def vocabulary_name(tokenizer: Any) -> str:
    """A short name for a tokenizer's tokens and their numbers: sha256."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[::-1]):
        digest.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _samples(model: nn.Module, count: int) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """For every parameter its name, up to `count` of its values on the CPU, and its shape.

    Of a sharded parameter the whole is looked at, of a quantized one the values it stands for.

    Raises:
        ValueError: for parameters whose values cannot be seen.
    """
    for name, parameter in model.named_parameters():
        whole = gathered(parameter.detach())
        if type(whole) is not Tensor and hasattr(whole, "dequantize"):
            whole = whole.dequantize()
        if whole.is_meta:
            raise ValueError(
                f"{name} has no values here (device 'meta', of an offloaded model): a memory is saved with "
                "the fingerprint of its weights; load the model without offloading"
            )
        values = whole.flatten()[:: max(whole.numel() // count, 1)][:count]
        if not values.is_floating_point():
            values = values.to(torch.float32)
        yield name, values.cpu(), tuple(parameter.shape)


def gathered(parameter: Any) -> Tensor:
    """The whole of a parameter, which may be sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _epsilon(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
