"""Moving rotated keys to other positions: each layer's kind of rotation, and rotation by a distance."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """How a layer's keys are rotated by their positions.

    layer_type: which of the model's rotary bases, if it has several (Gemma 3). interleaved: whether features
    2i and 2i + 1 form a plane, and not i and i + half.
    """

    layer_type: str | None
    interleaved: bool


def rotations(rotary: nn.Module, layer_types: list[str]) -> Iterator[Rotation]:
    """All kinds of rotation that the keys of this model may have."""
    takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
    for layer_type in dict.fromkeys(layer_types) if takes_type else [None]:
        for interleaved in (False, True):
            yield Rotation(layer_type, interleaved)


class Move:
    """Keys as if they stood `distance` positions later; earlier if it is negative.

    Args:
        rotary: the model's module: its own frequencies, in its own precision. For keys that it rotated in the
            same way the angles are computed once.
    """

    def __init__(self, rotary: nn.Module, distance: int) -> None:
        self.rotary, self.distance = rotary, distance
        self._angles: dict[tuple[Rotation, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, keys: Tensor, rotation: Rotation | None) -> Tensor:
        """keys (…, time, head_dim), rotated at whatever positions, moved.

        Features beyond those that the model rotates are left unchanged.

        Args:
            rotation: of this layer; None where its keys have no positions.
        """
        if rotation is None or not self.distance:
            return keys
        kind = rotation, keys.device
        if kind not in self._angles:
            self._angles[kind] = self._angles_of(rotation, keys)
        cos, sin = self._angles[kind]
        size = cos.shape[-1]
        turned, rest = keys[..., :size].to(cos.dtype), keys[..., size:]
        turned = turned * cos + _quarter_turn(turned, rotation.interleaved) * sin
        return torch.cat([turned.to(keys.dtype), rest], -1)

    def _angles_of(self, rotation: Rotation, keys: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        of_type = {} if rotation.layer_type is None else {"layer_type": rotation.layer_type}
        positions = torch.tensor([[0, abs(self.distance)]], device=keys.device)
        cosines: Any = self.rotary(torch.empty(0, dtype=dtype, device=keys.device), positions, **of_type)
        cos, sin = (x[0].to(dtype) for x in cosines)
        # Some models scale both, and the keys have this scale already: it is the cosine of position 0.
        cos, sin = cos[1] / cos[0], sin[1] / cos[0] * (1 if self.distance > 0 else -1)
        return _of_planes(cos, rotation.interleaved), _of_planes(sin, rotation.interleaved)


def _of_planes(x: Tensor, interleaved: bool) -> Tensor:
    """Values x (size,), each of them given twice, for the two features of a plane, in either order."""
    half = len(x) // 2
    planes = x[:half] if torch.equal(x[:half], x[half:]) else x[::2]
    return planes.repeat_interleave(2) if interleaved else planes.repeat(2)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
