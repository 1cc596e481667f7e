"""The model that a run's settings describe."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from titans.baselines.systems import system, system_config
from titans.hf import TitansConfig
from titans.train.settings import TrainSettings


def model_config(settings: TrainSettings, vocab_size: int) -> PreTrainedConfig:
    """The configuration that a run's preset and variant, or its system, and its changed fields describe.

    Raises:
        ValueError: for an unknown preset, variant, system or field, or a value outside its domain.
    """
    if "vocab_size" in settings.config:
        raise ValueError("config sets vocab_size, which the tokenizer decides: remove it")
    if "variant" in settings.config:
        raise ValueError("config sets variant, which is a setting of its own: set that instead")
    if settings.model is not None:
        return system_config(settings.model, settings.parameters, vocab_size, settings.config)
    return TitansConfig.from_preset(
        settings.preset, variant=settings.variant, vocab_size=vocab_size, **settings.config
    )


def make_model(settings: TrainSettings, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a run's configuration, with random weights."""
    if settings.model is not None:
        return system(settings.model).build(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def check_depth(config: TitansConfig, folder: Path) -> None:
    """Whether memories are as deep as those of the run whose weights are taken, whose default was another.

    Raises:
        ValueError: naming both depths.
    """
    if not (folder / "config.json").exists():
        return
    theirs = TitansConfig.from_pretrained(folder)
    if config.has_memory and theirs.memory_depth != config.memory_depth:
        raise ValueError(
            f"start_from={str(folder)!r} has memory_depth={theirs.memory_depth}, this run "
            f"{config.memory_depth}: set memory_depth={theirs.memory_depth} in config"
        )
