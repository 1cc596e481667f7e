"""Weights in parts: a checkpoint of several processes, each of which has written its own.

torch.distributed.checkpoint writes them as safetensors, and any number of processes reads them. Names of
tensors begin with what they belong to: model/NAME, optimizer/NAME/KEY.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

FOLDER, MODEL = "parts", "model"


def in_parts(folder: Path) -> bool:
    """Whether a checkpoint was written in parts."""
    return (folder / FOLDER).is_dir()


def sizes(folder: Path) -> dict[str, torch.Size]:
    """Name and shape of each tensor of a checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    with _reading(folder):
        kinds = _reader(folder).read_metadata().state_dict_metadata
        return {name: kind.size for name, kind in kinds.items()}


def read(folder: Path, tensors: dict[str, Any]) -> None:
    """Fill these tensors, whole or spread over processes, in place; all processes of a run call it.

    Raises:
        ValueError: if the checkpoint is damaged or of another model.
    """
    from torch.distributed import checkpoint as dcp

    with _reading(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(tensors, storage_reader=_reader(folder), no_dist=not torch.distributed.is_initialized())


def read_model(folder: Path, model: nn.Module) -> None:
    """Fill a model's parameters.

    Raises:
        ValueError: if the checkpoint is damaged or of another model.
    """
    read(folder, {f"{MODEL}/{name}": parameter.detach() for name, parameter in model.named_parameters()})


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder / FOLDER))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    from torch.distributed import checkpoint as dcp

    try:
        yield
    except (dcp.CheckpointException, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{folder / FOLDER} is damaged or of another model ({reason}): delete {folder.name} to resume "
            "from an older checkpoint, or name another folder"
        ) from None
