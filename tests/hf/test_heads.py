"""A Titans model that forecasts series, and one that classifies sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from titans.hf import (
    TitansConfig,
    TitansForecaster,
    TitansForecasterConfig,
    TitansForSequenceClassification,
)

SIZES: dict[str, Any] = dict(
    variant="lmm", hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    head_dim=8, chunk_size=4, num_persistent_tokens=2,
)  # fmt: skip


@torch.no_grad()
def test_a_forecast_has_the_unit_of_its_column_and_sees_no_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TitansForecaster(TitansForecasterConfig(**SIZES, patch_length=4, horizon=5)).double().eval()
    values = torch.randn(2, 24, 3, dtype=torch.float64).cumsum(1)
    found = model(values).forecast
    assert found.shape == (2, 5, 3)
    # Celsius or Fahrenheit: the same forecast.
    assert torch.allclose(model(1.8 * values + 32).forecast, 1.8 * found + 32)
    changed = values.clone()
    changed[:, :, 1] += torch.randn(24, dtype=torch.float64)
    assert torch.equal(model(changed).forecast[:, :, [0, 2]], found[:, :, [0, 2]])
    assert not torch.allclose(model(changed).forecast[:, :, 1], found[:, :, 1])
    # What a longer history begins with matters, and targets are compared in the same unit.
    assert not torch.allclose(model(values[:, 4:]).forecast, found)
    assert model(values, found + 2).loss == pytest.approx(4)

    model.float().save_pretrained(tmp_path)
    again = TitansForecaster.from_pretrained(tmp_path).eval()
    assert torch.equal(again(values.float()).forecast, model(values.float()).forecast)
    for wrong, message in (
        (values[:, :23], "multiple of patch_length=4"),
        (values / 0, "NaN or infinity"),
        (values[0], "give \\(batch, time, columns\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(wrong)
    with pytest.raises(ValueError, match="give \\(2, 5, 3\\)"):
        model(values.float(), found[:1])
    with pytest.raises(ValueError, match="horizon=0"):
        TitansForecasterConfig(**SIZES, horizon=0)
    misspelt: Any = {"horizn": 1}
    with pytest.raises(ValueError, match="horizn"):
        TitansForecasterConfig(**(SIZES | misspelt))


@torch.no_grad()
def test_a_sequence_has_the_same_class_alone_and_padded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TitansConfig(**SIZES, vocab_size=6)
    config.num_labels = 3
    model = TitansForSequenceClassification(config).double().eval()
    ids = torch.randint(1, 6, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    found = model(ids, mask).logits
    assert found.shape == (2, 3)
    assert torch.allclose(found[1], model(ids[1:, :7]).logits[0])
    labels = torch.tensor([2, 0])
    loss = torch.nn.functional.cross_entropy(found, labels)
    assert model(ids, mask, labels).loss == pytest.approx(float(loss))
    model.float().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, TitansForSequenceClassification)
    assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        model(ids, mask, torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="a row of zeros"):
        model(ids, mask * torch.tensor([[1], [0]]))
