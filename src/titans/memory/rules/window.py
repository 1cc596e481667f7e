"""The tokens before a stretch whose gradients a rule with a window takes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Tokens of one row in order, the newest last; leading dimensions … are any.

    The first three tensors of `MemoryState.extra` of a rule with a window are the `window − 1` newest tokens.
    Where fewer have been read, there are tokens with a step size of 0, which have no effect.
    """

    keys: Tensor  # (…, tokens, key_dim)
    values: Tensor  # (…, tokens, head_dim)
    step_size: Tensor  # (…, tokens, depth)

    def followed_by(self, newer: Window) -> Window:
        """These tokens and then those."""
        return Window(*(torch.cat(pair, -2) for pair in zip(self, newer, strict=True)))

    def newest(self, count: int) -> Window:
        """The last `count` tokens."""
        return Window(*(x.narrow(-2, x.shape[-2] - count, count) for x in self))

    def from_each(self, first: Tensor, count: int) -> Window:
        """`count` tokens from place `first`, (rows,), of each row on; of tensors (rows, tokens, features)."""
        places = first[:, None] + torch.arange(count, device=first.device)
        return Window(*(x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])) for x in self))


def window_shapes(window: int, weight_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Of one head's `Window` in the state, for weights (out, in) of each layer."""
    past, widths = window - 1, (weight_shapes[0][1], weight_shapes[-1][0], len(weight_shapes))
    return tuple((past, width) for width in widths)


def summed_over_windows(coefficients: Tensor, window: int) -> Tensor:
    """From what a step at each token is multiplied by, (…, time), to what each token's gradient is multiplied
    by, (…, window − 1 + time): a token is in the windows of itself and of the `window − 1` tokens after it.
    The mean over the window, hence divided by `window`."""
    padded = torch.nn.functional.pad(coefficients, (window - 1, window - 1))
    return padded.unfold(-1, window, 1).sum(-1) / window
