"""What a causal LM of transformers has read: its own cache, copied, selected, saved and loaded as a value.

With `titans.hf.cache` the only file that knows the library's cache interface.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from titans.hf.state_cache import LOAD_WITH_ITS_OWN, check_writer
from titans.hf.state_file import StateFile, write_state_file
from titans.memory_file import saved_model

_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
# The one number of a layer that depends on what was read.
_POSITION = "cumulative_length"


class CausalCache:
    """The cache of any causal LM, with the interface that `TitansCache` has, too.

    The library's caches differ in what they hold and in which of their methods work: recurrent layers cannot
    select rows, and a class of its own may forget a part when it is reordered. Here the tensors themselves
    are copied and selected: all that a cache and its layers hold, rows first.

    held: what the model returned, None before the first token. num_columns: tokens read, padding never.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.held: Any = None
        self.num_columns = 0

    def store(self, held: Any, num_columns: int) -> None:
        """Keep what the model returned after `num_columns` tokens more."""
        self.held = held
        self.num_columns += num_columns

    @property
    def batch_size(self) -> int:
        """Rows held, or −1 before the first token."""
        return next((leaf.shape[0] for leaf in named_leaves(self.held).values()), -1)

    def get_seq_length(self) -> int:
        """Tokens read: what `generate` asks of a cache."""
        return self.num_columns

    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(leaf.numel() * leaf.element_size() for leaf in named_leaves(self.held).values())

    def clone(self) -> CausalCache:
        """An independent copy: both may go on reading.

        Keys and values are shared, because the library never writes to them in place; recurrent states are
        copied, because it does.
        """
        other = CausalCache()
        other.num_columns = self.num_columns

        def copied(name: str, leaf: Tensor, shared: bool) -> Tensor:
            # A window is cut out of the keys of the last call, which it would keep alive.
            return leaf if shared and leaf.untyped_storage().nbytes() == leaf.nbytes else leaf.clone()

        other.held = _rebuilt(self.held, copied)
        return other

    __deepcopy__ = lambda self, memo: self.clone()  # noqa: E731

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""

        def select(name: str, leaf: Tensor, shared: bool) -> Tensor:
            return leaf.index_select(0, indices.to(leaf.device))

        self.held = _rebuilt(self.held, select)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if repeats > 1 and self.held is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @classmethod
    def side_by_side(cls, caches: Sequence[CausalCache]) -> CausalCache:
        """One cache with the rows of several that have read something, one after the other.

        Keys and values of the shorter ones have zeros before them, which a mask must hide; `num_columns` is
        that of the longest.

        Raises:
            RuntimeError: for caches that hold something else of different sizes.
        """
        leaves = [named_leaves(cache.held) for cache in caches]
        joined = cls()
        joined.num_columns = max(cache.num_columns for cache in caches)

        def together(name: str, leaf: Tensor, shared: bool) -> Tensor:
            parts = [mine[name] for mine in leaves]
            if shared:
                most = max(part.shape[-2] for part in parts)
                parts = [F.pad(part, (0, 0, most - part.shape[-2], 0)) for part in parts]
            return torch.cat(parts)

        joined.held = _rebuilt(caches[0].held, together, _position(joined.num_columns))
        return joined

    def row(self, index: int, num_columns: int) -> CausalCache:
        """One row as it would stand alone after so many tokens; nothing of the others is kept alive."""
        alone = type(self)()
        alone.num_columns = num_columns

        def of_row(name: str, leaf: Tensor, shared: bool) -> Tensor:
            mine = leaf[index : index + 1]
            return (mine[..., -num_columns:, :] if shared else mine).clone()

        alone.held = _rebuilt(self.held, of_row, _position(num_columns))
        return alone

    def save(
        self, path: str | Path, config: PreTrainedConfig, metadata: dict[str, str] | None = None
    ) -> None:
        """Write the tensors to one safetensors file, through a temporary name.

        config: of the model; its type and sizes are written, and must be the same where the file is loaded.
        """
        about = {
            **(metadata or {}),
            "config": json.dumps(_sizes(config)),
            "num_columns": str(self.num_columns),
        }
        write_state_file(Path(path), named_leaves(self.held), about)

    @classmethod
    def from_file(cls, file: StateFile, config: PreTrainedConfig, template: CausalCache) -> CausalCache:
        """What `save` wrote.

        Args:
            template: of one row and one token of the model that goes on from it: it decides structure and
                precision.

        Raises:
            ValueError: for a file of another model or kind of cache, or values that no model could have
                written.
        """
        saved, num_columns = saved_model(file.header)
        of_graft = saved.get("model_type") == "titans-graft"
        remedy = (
            "graft the model first (titans.graft, or --graft in a shell)" if of_graft else LOAD_WITH_ITS_OWN
        )
        check_writer(file.path, saved, _sizes(config), remedy)
        loaded = cls()
        if not num_columns and not file.kinds:
            return loaded
        wanted = named_leaves(template.held)
        if different := sorted(wanted.keys() ^ file.kinds.keys()):
            raise ValueError(
                f"{file.path} does not hold exactly the tensors of such a model: {different[0]} differs"
            )
        tensors = file.tensors()
        rows = {tensor.shape[0] for tensor in tensors.values()}
        for name, tensor in tensors.items():
            _check_tensor(file.path, name, tensor, wanted[name], num_columns)
        if len(rows) != 1:
            raise ValueError(f"{file.path} holds tensors of several numbers of rows; the memory is damaged")
        loaded.num_columns = num_columns
        loaded.held = _rebuilt(
            template.held,
            lambda name, leaf, shared: converted(file.path, name, tensors[name], leaf),
            _position(num_columns),
        )
        return loaded


def attention_reach(config: PreTrainedConfig) -> float:
    """How many tokens back attention sees through all layers; 0 where all layers are recurrent."""
    layers = DynamicCache(config=config).layers
    attention = [layer for layer in layers if isinstance(layer, DynamicLayer)]
    if not layers or not all(layer.is_sliding for layer in attention):
        return math.inf
    return sum(layer.get_max_length() for layer in attention)


def converted(path: Path, name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a file's finite tensor in the precision and on the device of another.

    A copy, because tensors that are equal by chance must not be one.

    Raises:
        ValueError: if it holds numbers too large for that precision.
    """
    new = tensor.to(like.device, like.dtype, copy=True)
    if not torch.isfinite(new).all():
        raise ValueError(
            f"{path}: {name} holds numbers too large for {like.dtype}: load the model in {tensor.dtype}"
        )
    return new


def named_leaves(held: Any) -> dict[str, Tensor]:
    """All tensors of a cache that have rows, by their place in it."""
    found: dict[str, Tensor] = {}

    def note(name: str, leaf: Tensor, shared: bool) -> Tensor:
        found[name] = leaf
        return leaf

    _rebuilt(held, note)
    return found


def _position(num_columns: int) -> Callable[[str], int | None]:
    """For `_rebuilt`: the number of a layer that says how much was read."""
    return lambda name: num_columns if name == _POSITION else None


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    text = config.get_text_config(decoder=True)
    return {name: getattr(text, name, None) for name in _SIZES}


def _check_tensor(path: Path, name: str, tensor: Tensor, like: Tensor, num_columns: int) -> None:
    shape, grows = list(like.shape), name.rpartition(".")[2] in ("keys", "values") and like.dim() > 2
    if tensor.dim() == like.dim():
        shape[0] = tensor.shape[0]
        if grows and tensor.shape[-2] <= num_columns:
            shape[-2] = tensor.shape[-2]
    if list(tensor.shape) != shape:
        raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}")
    if tensor.is_floating_point() != like.is_floating_point():
        raise ValueError(f"{path}: {name} has dtype {tensor.dtype}, the model needs {like.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} holds NaN or infinite values; the memory is damaged")


def _rebuilt(
    value: Any,
    tensor: Callable[[str, Tensor, bool], Tensor],
    number: Callable[[str], int | None] = lambda name: None,
    name: str = "",
    shared: bool = False,
) -> Any:
    """A copy of a cache with other tensors.

    Args:
        tensor: gives the new one for a tensor's place in the cache, the tensor, and whether the library
            leaves such a tensor unwritten, so that it may be shared.
        number: gives the new value of an attribute, or None to leave it.
    """

    def inner(key: Any, x: Any, shared: bool = shared) -> Any:
        return _rebuilt(x, tensor, number, f"{name}.{key}" if name else str(key), shared)

    if isinstance(value, Tensor):
        # Counters and sizes without rows; some models count in place.
        return tensor(name, value, shared) if value.dim() else value.clone()
    if isinstance(value, dict):
        return {key: inner(key, x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([inner(index, x) for index, x in enumerate(value)])
    if _is_cache(value):
        new = copy.copy(value)
        for key, x in vars(value).items():
            grown = isinstance(value, DynamicLayer) and key in ("keys", "values")
            replaced = number(key) if isinstance(x, int) else None
            setattr(new, key, inner(key, x, grown) if replaced is None else replaced)
        return new
    return value


def _is_cache(value: Any) -> bool:
    """Whether a value may hold a model's states: a cache, one of its layers, or a cache of another kind."""
    known = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)
    return isinstance(value, known) or type(value).__name__.endswith("Cache")
