"""Forecasts to compare with: the past repeated, and a linear map of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SeasonalNaive(nn.Module):
    """What follows is what was a period ago; with a period of 1 the last value (persistence)."""

    def __init__(self, horizon: int, period: int = 1) -> None:
        super().__init__()
        self.horizon, self.period = horizon, period

    def forward(self, values: Tensor) -> Tensor:
        """values (batch, time, columns) → (batch, horizon, columns).

        Raises:
            ValueError: if the history is shorter than a period.
        """
        if values.shape[1] < self.period:
            raise ValueError(
                f"period={self.period}: the history has {values.shape[1]} steps; give a longer one"
            )
        last = values[:, values.shape[1] - self.period :]
        times = -(-self.horizon // self.period)
        return last.repeat(1, times, 1)[:, : self.horizon]


class DLinear(nn.Module):
    """DLinear (Zeng and others, arXiv 2205.13504): a moving average and the rest, each mapped linearly.

    One map for all columns. Args: history, horizon: steps. kernel: of the moving average, an odd number.
    """

    def __init__(self, history: int, horizon: int, kernel: int = 25) -> None:
        super().__init__()
        self.kernel = kernel
        self.trend, self.rest = nn.Linear(history, horizon), nn.Linear(history, horizon)
        # As its authors do: the mean of the history.
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / history)

    def forward(self, values: Tensor) -> Tensor:
        """values (batch, history, columns) → (batch, horizon, columns)."""
        rows = values.transpose(1, 2)
        side = (self.kernel - 1) // 2
        trend = F.avg_pool1d(F.pad(rows, (side, side), mode="replicate"), self.kernel, stride=1)
        return (self.trend(trend) + self.rest(rows - trend)).transpose(1, 2)
