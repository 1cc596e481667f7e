"""The memories that a run carries from step to step, in a checkpoint: a file for the rows of each process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from titans.hf import TitansCache, TitansConfig
from titans.state import stacked

_NAME = "carried_memory"


def save(
    folder: Path, config: TitansConfig, states: tuple[Any, ...], num_columns: int, first_row: int
) -> None:
    """Write the states of consecutive rows of a step, the first of which has this number."""
    cache = TitansCache(config)
    cache.store(states, num_columns)
    cache.save(folder / (f"{_NAME}-{first_row:06}.safetensors" if first_row else f"{_NAME}.safetensors"))


def load(
    folder: Path, config: TitansConfig, rows: range, device: torch.device
) -> tuple[tuple[Any, ...], int]:
    """The states of these rows, however many processes wrote them, and how many columns they have read.

    Raises:
        ValueError: for files that are damaged or of another model, or that lack a row.
    """
    files = {int(path.stem.partition("-")[2] or 0): path for path in folder.glob(f"{_NAME}*.safetensors")}
    caches, begin, end = [], rows.start, rows.start
    for first_row, path in sorted(files.items()):
        later = [start for start in files if start > first_row]
        if first_row >= rows.stop or (later and min(later) <= rows.start):
            continue  # none of these rows
        caches.append(TitansCache.load(path, config, device))
        begin, end = min(begin, first_row), first_row + caches[-1].batch_size
    if end < rows.stop:
        raise ValueError(
            f"{folder} holds the memories of {end} rows, and row {rows.stop - 1} is asked for: delete "
            f"{folder.name} to resume from an older checkpoint"
        )
    states = stacked([cache.states for cache in caches]) if len(caches) > 1 else caches[0].states
    whole = TitansCache(config)
    whole.store(states, caches[0].num_columns)
    if (begin, end) != (rows.start, rows.stop):
        whole.batch_select_indices(torch.arange(rows.start - begin, rows.stop - begin))
    assert whole.states is not None
    return whole.states, whole.num_columns
