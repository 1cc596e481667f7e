"""Training on transformers' Trainer: settings in; model, checkpoints, metrics and curves in a folder out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Loaded on first use: the command line needs the settings alone to answer --help.
_HOME = {
    "FactSettings": "titans.train.settings",
    "Interrupted": "titans.train.recipe",
    "NonFiniteError": "titans.train.trainer",
    "TitansTrainer": "titans.train.trainer",
    "TrainResult": "titans.train.recipe",
    "TrainSettings": "titans.train.settings",
    "TrainingRun": "titans.train.recipe",
    "train": "titans.train.recipe",
}

__all__ = [
    "FactSettings",
    "Interrupted",
    "NonFiniteError",
    "TitansTrainer",
    "TrainResult",
    "TrainSettings",
    "TrainingRun",
    "train",
]

if TYPE_CHECKING:
    from titans.train.recipe import Interrupted, TrainingRun, TrainResult, train
    from titans.train.settings import FactSettings, TrainSettings
    from titans.train.trainer import NonFiniteError, TitansTrainer


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'titans.train' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
