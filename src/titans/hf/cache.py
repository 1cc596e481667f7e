"""The states of a Titans model as transformers' `Cache`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf.configuration import TitansConfig, saved_state_fields
from titans.hf.state_cache import StateCache, check_writer, named_leaves, saved_ids
from titans.hf.state_file import Kind, StateFile, damaged_header, open_state_file
from titans.nn.blocks import BLOCKS
from titans.state import compact, expanded, grows


class TitansCache(StateCache):
    """What a Titans model has read, per layer: memory, attention window or segment, convolution tails."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config, config.num_hidden_layers)

    @classmethod
    def load(cls, path: str | Path, config: TitansConfig, device: torch.device | str = "cpu") -> TitansCache:
        """Read a file written by `save`; nothing in it is executed.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a damaged file, another format, a state of another configuration, or values that
                no model could have written; says which.
        """
        with open_state_file(path) as file:
            return cls.from_file(file, config, device)

    @classmethod
    def from_file(
        cls, file: StateFile, config: TitansConfig, device: torch.device | str = "cpu"
    ) -> TitansCache:
        """`load`, from a file that is open already."""
        saved, num_columns = saved_sizes(file)
        check_writer(file.path, saved, config.state_fields())
        template = _template(config)
        _check_kinds(file, template)
        read = file.tensors()
        moved = {id(tensor): tensor.to(device) for tensor in read.values()}
        stored = {name: moved[id(tensor)] for name, tensor in read.items()}
        # Positions that are equal by chance must not be one tensor.
        tensors = {n: x if x.is_floating_point() else x.clone() for n, x in stored.items()}
        states = _as_states(file.path, tensors, template, num_columns)
        cache = cls(config)
        cache.store(states, num_columns)
        cache._newest_ids = saved_ids(file, cache.batch_size, config.vocab_size)
        return cache


def saved_sizes(file: StateFile) -> tuple[dict[str, Any], int]:
    """`TitansConfig.state_fields` of the model that wrote a state file, and how many columns it has read.

    Raises:
        ValueError: if the header does not state them, or states what no model of this version can be.
    """
    try:
        saved, num_columns = json.loads(file.about["config"]), int(file.about["num_columns"])
        # Positions are turned into float64 angles, which are exact up to here.
        damaged = not 0 <= num_columns < 2**53 or int(saved["num_hidden_layers"]) > len(file.kinds)
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError):
        raise damaged_header(file.path) from None
    if damaged:
        raise damaged_header(file.path)
    try:
        return saved_state_fields(saved), num_columns
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"{file.path} was written by a model that this version cannot make: {error}"
        ) from None


def _check_kinds(file: StateFile, template: tuple[Any, ...]) -> None:
    """Whether a file holds what such a model's states consist of.

    Raises:
        ValueError: for a tensor too many or too few, or one of another shape or type.
    """
    named, kinds = named_leaves(template), file.kinds
    if different := sorted({name for name, _ in named} ^ kinds.keys()):
        raise ValueError(
            f"{file.path} does not hold exactly the tensors of such a model: {different[0]} differs"
        )
    growing = _growing_leaves(template)
    held = [(kinds[name].shape, leaf) for name, leaf in named if name in growing]
    slots = max((shape[1] for shape, leaf in held if len(shape) == leaf.dim()), default=0)
    batch = next(iter(kinds[named[0][0]].shape), 0)
    for name, leaf in named:
        rest = (slots, *leaf.shape[2:]) if name in growing else leaf.shape[1:]
        _check_kind(file.path, name, kinds[name], (batch, *rest), leaf.dtype)


def _as_states(
    path: str | Path, tensors: dict[str, Tensor], template: tuple[Any, ...], num_columns: int
) -> tuple[Any, ...]:
    """A file's tensors as states; ValueError for numbers that no model could have written."""
    named = named_leaves(template)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int64 and (tensor < 0).any():
            raise ValueError(f"{path}: {name} holds no valid positions; the memory is damaged")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the memory is damaged")
    positions = torch.stack([tensors[name] for name, _ in named if name.endswith(".position")])
    if not positions.numel() or (positions != positions[0]).any() or positions.max() > num_columns:
        raise ValueError(f"{path}: its positions contradict each other; the memory is damaged")
    structure = pytree.tree_structure(expanded(template))
    states = compact(pytree.tree_unflatten([tensors[name] for name, _ in named], structure))
    parts = pytree.tree_leaves(states, is_leaf=grows)
    if not all(part.is_whole() for part in parts if grows(part)):
        raise ValueError(f"{path}: its counts contradict the slots it holds; the memory is damaged")
    return states


def _template(config: TitansConfig) -> tuple[Any, ...]:
    """States of the right structure, shapes and least dtypes, without storage."""
    settings = config.block_settings()
    with torch.device("meta"):
        block = BLOCKS[config.variant](_without_persistent(settings)).bfloat16()
        return (block.initial_state(1),) * config.num_hidden_layers


def _without_persistent(settings: Any) -> Any:
    # Their number shapes no state, and reading them needs real weights.
    return type(settings)(**{**vars(settings), "num_persistent_tokens": 0})


def _growing_leaves(states: Any) -> set[str]:
    """Names of the leaves whose second dimension grows with what has been read."""

    found = set()
    for path, part in pytree.tree_flatten_with_path(states, is_leaf=grows)[0]:
        for name in part.growing if grows(part) else ():
            inner = pytree.tree_flatten_with_path(getattr(part, name))[0]
            found |= {f"{pytree.keystr(path)}.{name}{pytree.keystr(rest)}".lstrip(".") for rest, _ in inner}
    return found


def _check_kind(path: Path, name: str, kind: Kind, shape: tuple[int, ...], least: torch.dtype) -> None:
    if kind.shape != shape:
        raise ValueError(f"{path}: {name} has shape {kind.shape}, the model needs {shape}")
    # A model may be narrower than float32, a memory never is.
    allowed = [torch.int64] if least == torch.int64 else [torch.float32, torch.float64]
    if least == torch.bfloat16:
        allowed += [torch.float16, torch.bfloat16]
    if kind.dtype not in allowed:
        raise ValueError(f"{path}: {name} has dtype {kind.dtype}, the model needs {allowed[0]}")
