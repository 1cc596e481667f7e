"""Forecasts of numeric series with a Titans model: `TitansForecaster`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import ModelOutput

from titans.hf.configuration import TitansConfig
from titans.hf.layer import TitansPreTrainedModel
from titans.hf.modeling import TitansModel

_SMALLEST_STD = 1e-5


@strict
class TitansForecasterConfig(TitansConfig):
    """A `TitansConfig` whose tokens are patches of a series; `vocab_size` means nothing.

    Args:
        patch_length: steps of one column that make a token.
        horizon: steps that are forecast at once.

    Raises:
        ValueError: for an unknown field or a value outside its domain.
    """

    model_type = "titans-forecaster"

    vocab_size: int = 1
    patch_length: int = 16
    horizon: int = 96

    def validate_architecture(self) -> None:
        super().validate_architecture()
        for name in ("patch_length", "horizon"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")


@dataclass
class TitansForecast(ModelOutput):
    """forecast: (batch, horizon, columns). loss: mean squared error, if targets were given."""

    loss: Tensor | None = None
    forecast: Tensor | None = None


class TitansForecaster(TitansPreTrainedModel):
    """Reads the history of a series and forecasts what follows.

    Each column is read by itself: its mean and standard deviation over the history are taken out and given
    back to the forecast, its patches are the tokens, and the last token's state is mapped to the horizon. So
    a history of any length is read, at constant memory where the variant's is constant. Patches and columns
    as in PatchTST (arXiv 2211.14730), the reader as in section 5.5 of arXiv 2501.00663.
    """

    config: TitansForecasterConfig
    config_class = TitansForecasterConfig
    main_input_name = "values"

    def __init__(self, config: TitansForecasterConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.patch = nn.Linear(config.patch_length, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.horizon)
        self.post_init()

    def forward(self, values: Tensor, targets: Tensor | None = None) -> TitansForecast:
        """Forecast.

        Args:
            values: (batch, time, columns), in any unit; time is a multiple of `patch_length`.
            targets: (batch, horizon, columns), in the same unit; the loss is in this unit squared.

        Raises:
            ValueError: for another shape, or values that are not finite.
        """
        length = self.config.patch_length
        if values.ndim != 3 or values.shape[1] < length or values.shape[1] % length:
            raise ValueError(
                f"values has shape {tuple(values.shape)}: give (batch, time, columns) with a time that is a "
                f"multiple of patch_length={length}"
            )
        if not torch.isfinite(values).all():
            raise ValueError("values holds NaN or infinity: fill gaps first, as titans.data.load_series does")
        batch, _, columns = values.shape
        wanted = (batch, self.config.horizon, columns)
        if targets is not None and targets.shape != wanted:
            raise ValueError(f"targets has shape {tuple(targets.shape)}: give {wanted}")
        mean = values.mean(1, keepdim=True)
        std = values.std(1, keepdim=True, correction=0).clamp_min(_SMALLEST_STD)
        rows = ((values - mean) / std).transpose(1, 2).flatten(0, 1).unflatten(1, (-1, length))
        states = self.model(inputs_embeds=self.patch(rows), use_cache=False).last_hidden_state
        forecast = self.head(states[:, -1]).unflatten(0, (batch, columns)).transpose(1, 2) * std + mean
        loss = None if targets is None else (forecast - targets).square().mean()
        return TitansForecast(loss=loss, forecast=forecast)


AutoConfig.register("titans-forecaster", TitansForecasterConfig)
