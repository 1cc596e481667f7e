"""With which projections a memory begins before it is trained: random ones, or some that recall already.

"induction": a repeated context retrieves the token that followed it. The query of the second "… the code is"
equals the key under which the token after the first one was written. From other initial weights, training
must find this equality before the memory recalls anything.

"sharp": the same with contexts of one token. A query sees the newest token alone, so that the tokens before
it do not change it. Features of high bandwidth need this: they do not recall with a query that is only
similar to its key.
"""

from __future__ import annotations

import torch
from torch import nn

from titans.nn.conv import CausalConv

STARTS = ("random", "induction", "sharp")
# In these a key sees the token before the one that its value sees.
RECALL = ("induction", "sharp")


def refuses(start: str, conv_kernel: int) -> str | None:
    """Why a memory with such a convolution cannot begin so, or None."""
    if start not in STARTS:
        return f"start={start!r}: choose one of {list(STARTS)}"
    if start in RECALL and conv_kernel < 2:
        return f"start={start!r} looks one token back: give a conv_kernel of at least 2"
    return None


@torch.no_grad()
def begin_as_induction(projection: nn.Linear, conv: CausalConv, *, sharp: bool) -> None:
    """Keys see what queries see, one token later, and values the newest token alone.

    Args:
        projection: to queries, keys, values and a gate. conv: on the first three.
        sharp: queries see the newest token alone.
    """
    queries, keys, _, _ = projection.weight.chunk(4)
    keys.copy_(queries)
    of_queries, of_keys, of_values = conv.weight.chunk(3)
    if sharp:
        of_queries.zero_()
        of_queries[:, -1] = 1
    else:
        nn.init.normal_(of_queries, std=(conv.kernel_size - 1) ** -0.5)
        of_queries[:, 0] = 0
    of_keys.copy_(of_queries.roll(-1, 1))
    of_values.zero_()
    of_values[:, -1] = 1
