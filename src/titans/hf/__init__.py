"""Titans in the transformers library: configuration, models, cache; registered with the Auto classes."""

from titans.hf.cache import TitansCache
from titans.hf.configuration import TitansConfig
from titans.hf.modeling import TitansForCausalLM, TitansModel, TitansOutput
from titans.hf.presets import PEAK_LEARNING_RATES, PRESETS

__all__ = [
    "PEAK_LEARNING_RATES",
    "PRESETS",
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "TitansOutput",
]
