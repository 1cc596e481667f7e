"""The experiments by name."""

from __future__ import annotations

from titans.experiments.adaptation import AdaptationGains
from titans.experiments.beginnings import Beginnings
from titans.experiments.caching import MemoryCaching
from titans.experiments.endless import Endless
from titans.experiments.family import Family
from titans.experiments.forms import Forms
from titans.experiments.goals import Goals
from titans.experiments.graft_comparison import GraftComparison
from titans.experiments.graft_training import GraftTraining
from titans.experiments.language import Language
from titans.experiments.learning import Learning
from titans.experiments.memory_forms import MemoryForms
from titans.experiments.memory_questions import MemoryQuestions
from titans.experiments.needles import Needles
from titans.experiments.robustness import Robustness
from titans.experiments.runner import Experiment
from titans.experiments.synthetic import Synthetic
from titans.experiments.training_length import TrainingLength

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Needles(),
        Language(),
        Learning(),
        MemoryQuestions(),
        TrainingLength(),
        Beginnings(),
        Synthetic(),
        Forms(),
        MemoryForms(),
        Family(),
        MemoryCaching(),
        Robustness(),
        Endless(),
        AdaptationGains(),
        GraftComparison(),
        GraftTraining(),
        Goals(),
    )
}
