"""The systems that the paper compares with, and those since: each trained from scratch by the same command.

A system is one entry of `SYSTEMS` in a file of this folder: a function from sizes to a configuration of
transformers. `titans train --model NAME --parameters 1M` trains it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from titans.baselines.systems import attention, delta, mamba, recurrent_gemma, titans
from titans.baselines.systems.system import (
    WINDOW,
    Sizes,
    System,
    count_parameters,
    parse_parameters,
)

SYSTEMS: dict[str, System] = {
    **titans.SYSTEMS,
    **attention.SYSTEMS,
    **mamba.SYSTEMS,
    **delta.SYSTEMS,
    **recurrent_gemma.SYSTEMS,
}


def system(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: listing the names.
    """
    if name not in SYSTEMS:
        raise ValueError(f"model={name!r}: choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def system_config(
    name: str, parameters: str | int, vocab_size: int = 256, changes: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """The configuration of a system of so many parameters, such as "1M", to 2 %; see `System.sized`."""
    count = parse_parameters(parameters) if isinstance(parameters, str) else parameters
    return copy.deepcopy(_sized(name, count, vocab_size, json.dumps(changes or {}, sort_keys=True)))


@functools.lru_cache
def _sized(name: str, parameters: int, vocab_size: int, changes: str) -> PreTrainedConfig:
    """`System.sized`, which builds a dozen models without storage, once for every process."""
    return system(name).sized(parameters, vocab_size, changes=json.loads(changes))


def load_system(name: str, folder: Path) -> PreTrainedModel:
    """A trained system from the folder of its run, in evaluation mode."""
    logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    system(name).prepare(model)
    return model.eval()


__all__ = [
    "SYSTEMS",
    "WINDOW",
    "Sizes",
    "System",
    "count_parameters",
    "load_system",
    "parse_parameters",
    "system",
    "system_config",
]
