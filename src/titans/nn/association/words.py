"""Words as an association writes and reads them: directions made of the rows of a language model's head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.whitening import whitening_of

# The share of the mean eigenvalue by which each eigenvalue of the rows' covariance is raised.
_FLOOR = 0.3
# Rows that are multiplied at once.
_AT_ONCE = 8192


class Words(nn.Module):
    """v_j = unit(A (E_j − mean)), where E_j is the row of word j of the vocabulary in a model's head.

    A is the symmetric inverse root of the rows' covariance. Without it frequent directions of the rows would
    make all words alike. Everything but the rows themselves is known from them, and therefore not saved.
    """

    mean: Tensor
    root: Tensor
    lengths: Tensor

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size), persistent=False)
        self.register_buffer("root", torch.eye(hidden_size), persistent=False)
        self.register_buffer("lengths", torch.ones(vocab_size), persistent=False)

    @torch.no_grad()
    def set_rows(self, rows: Tensor) -> None:
        """Set mean, A and the lengths ‖A (E_j − mean)‖ from the rows (vocab, hidden)."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        found = whitening_of(rows.to(wide), _FLOOR)
        self.mean.copy_(found.mean)
        self.root.copy_(found.root)
        mean, root = found.mean.to(wide), found.root.to(wide)
        lengths = [((part.to(wide) - mean) @ root).norm(dim=-1) for part in rows.split(_AT_ONCE)]
        # A row that is the mean itself has no direction.
        self.lengths.copy_(torch.cat(lengths).clamp_min(1e-6))

    def codes(self, ids: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """v of words (…), 0 for −1: (…, hidden) in `dtype`, at least float32."""
        centred = rows[ids.clamp_min(0)].to(dtype) - self.mean.to(dtype)
        codes = centred @ self.root.to(dtype)
        return F.normalize(codes, dim=-1, eps=1e-6).masked_fill(ids[..., None] < 0, 0)

    def products(self, x: Tensor, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """v_j · x of all words, from one product with the rows, in their precision.

        Args:
            x: (…, hidden), at least float32.
            rows: (vocab, hidden), or those of the chosen words.
            chosen: (n,) int64, which words the rows are of; None for all.

        Returns (…, n), in the dtype of x.
        """
        turned = x @ self.root.to(x.dtype)
        products = (turned.to(rows.dtype) @ rows.mT).to(x.dtype) - turned @ self.mean.to(x.dtype)[:, None]
        lengths = self.lengths if chosen is None else self.lengths[chosen]
        return products / lengths.to(x.dtype)
