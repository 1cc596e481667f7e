"""Training on transformers' Trainer: settings in; model, checkpoints, metrics and curves in a folder out.

`fit_graft` trains the memories of a graft instead, on cached features of its base.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Loaded on first use: the command line needs the settings alone to answer --help.
_HOME = {
    "AdaptationTraining": "titans.train.graft.settings",
    "FactSettings": "titans.train.settings",
    "FeatureSettings": "titans.train.graft.settings",
    "GraftTraining": "titans.train.graft.settings",
    "Interrupted": "titans.train.recipe",
    "NonFiniteError": "titans.train.trainer",
    "TitansTrainer": "titans.train.trainer",
    "TrainResult": "titans.train.recipe",
    "TrainSettings": "titans.train.settings",
    "TrainingRun": "titans.train.recipe",
    "fit_graft": "titans.train.graft.run",
    "train": "titans.train.recipe",
}

__all__ = [
    "AdaptationTraining",
    "FactSettings",
    "FeatureSettings",
    "GraftTraining",
    "Interrupted",
    "NonFiniteError",
    "TitansTrainer",
    "TrainResult",
    "TrainSettings",
    "TrainingRun",
    "fit_graft",
    "train",
]

if TYPE_CHECKING:
    from titans.train.graft.run import fit_graft
    from titans.train.graft.settings import AdaptationTraining, FeatureSettings, GraftTraining
    from titans.train.recipe import Interrupted, TrainingRun, TrainResult, train
    from titans.train.settings import FactSettings, TrainSettings
    from titans.train.trainer import NonFiniteError, TitansTrainer


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'titans.train' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
