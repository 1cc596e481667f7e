"""One softmax over two sets of keys: tokens with a position, and persistent tokens without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    rotated: Tensor,
    plain: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    persistent: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax([plain · persistent_keys, rotated · keys]) · [persistent_values, values].

    rotated, plain: the queries with and without rotation, already divided by √head_dim: (batch, num_queries,
    heads, head_dim). keys, values: (batch, num_keys, heads, head_dim), keys rotated. visible: bool,
    broadcasts to (batch, num_queries, num_keys). persistent: keys and values of the persistent tokens,
    (num_persistent, heads, head_dim) each, seen by every query. Every query must see at least one key.
    Returns (batch, num_queries, heads, head_dim).
    """
    if rotated.is_cuda:
        return _attend_fused(rotated, plain, keys, values, visible, persistent)
    return _attend_matmul(rotated, plain, keys, values, visible, persistent)


def _attend_matmul(
    rotated: Tensor,
    plain: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    persistent: tuple[Tensor, Tensor] | None,
) -> Tensor:
    batch, count, heads, dim = rotated.shape

    def by_head(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * heads, x.shape[1], dim)

    scores = torch.bmm(by_head(rotated), by_head(keys).transpose(1, 2)).view(
        batch, heads, count, keys.shape[1]
    )
    scores.masked_fill_(~visible.unsqueeze(-3), float("-inf"))
    if persistent is not None:
        fixed_keys, fixed_values = persistent
        # A batch over heads alone: the persistent keys are not copied for every row.
        queries = plain.permute(2, 0, 1, 3).reshape(heads, batch * count, dim)
        fixed = (
            torch.bmm(queries, fixed_keys.permute(1, 2, 0))
            .view(heads, batch, count, fixed_keys.shape[0])
            .transpose(0, 1)
        )
        scores = torch.cat([fixed, scores], dim=-1)
        values = torch.cat([fixed_values.expand(batch, -1, -1, -1), values], dim=1)
    # The softmax kernels accumulate in float32 for narrower dtypes.
    weights = scores.softmax(-1).view(batch * heads, count, scores.shape[-1])
    return torch.bmm(weights, by_head(values)).view(batch, heads, count, dim).transpose(1, 2)


def _attend_fused(
    rotated: Tensor,
    plain: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    persistent: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The same with both sets as one, features side by side, in a kernel that never stores the scores."""
    if persistent is not None:
        fixed_keys, fixed_values = persistent
        rotated = torch.cat([rotated, plain], dim=-1)
        dim = fixed_keys.shape[-1]
        fixed_keys, keys = F.pad(fixed_keys, (dim, 0)), F.pad(keys, (0, dim))
        keys = torch.cat([fixed_keys.expand(keys.shape[0], -1, -1, -1), keys], dim=1)
        values = torch.cat([fixed_values.expand(values.shape[0], -1, -1, -1), values], dim=1)
        visible = F.pad(visible, (fixed_keys.shape[0], 0), value=True)
    y = F.scaled_dot_product_attention(
        rotated.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        visible.unsqueeze(-3),
        scale=1.0,
    )
    return y.transpose(1, 2)
