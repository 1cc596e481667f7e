"""Titans and grafts in the transformers library: configuration, models, cache; known to the Auto classes."""

from titans.hf.cache import TitansCache
from titans.hf.classification import TitansForSequenceClassification
from titans.hf.configuration import TitansConfig
from titans.hf.forecasting import TitansForecast, TitansForecaster, TitansForecasterConfig
from titans.hf.graft import GraftCache, GraftConfig, GraftedForCausalLM
from titans.hf.modeling import TitansForCausalLM, TitansModel, TitansOutput
from titans.hf.presets import PEAK_LEARNING_RATES, PRESETS

__all__ = [
    "PEAK_LEARNING_RATES",
    "PRESETS",
    "GraftCache",
    "GraftConfig",
    "GraftedForCausalLM",
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForSequenceClassification",
    "TitansForecast",
    "TitansForecaster",
    "TitansForecasterConfig",
    "TitansModel",
    "TitansOutput",
]
