"""The model's state as transformers' `Cache`. The only file that knows the library's cache interface."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin

from titans.hf.configuration import TitansConfig, saved_state_fields
from titans.hf.state_file import Kind, StateFile, damaged_header, open_state_file, write_state_file
from titans.nn.attention.full import FullAttentionState
from titans.nn.blocks import BLOCKS
from titans.state import compact, expanded, map_state, state_nbytes

_NUM_NEWEST = 16


@dataclass
class _Columns:
    """How many a cache and all its layers have seen, and of these before the present call of `generate`."""

    seen: int = 0
    before_call: int = 0


class TitansCacheLayer(CacheLayerMixin):
    """One block's state, or None before the first token.

    It does not know its cache: two that know each other stay in memory until Python looks for cycles.
    """

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self.columns = columns
        self.state: Any = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Blocks make their own first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a TitansCache holds whole block states: it is filled by the model, not by update()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns.seen - self.columns.before_call

    def get_max_length(self) -> int:
        return -1


class TitansCache(Cache):
    """Everything a model has read, per layer: memory, attention window or segment, convolution tails.

    It can be reordered, repeated, selected, reset, copied (`clone`), saved and loaded; it cannot be cropped,
    because what a memory has learned cannot be unlearned.
    """

    layers: list[TitansCacheLayer]

    def __init__(self, config: TitansConfig) -> None:
        self._columns = _Columns()
        super().__init__(layers=[TitansCacheLayer(self._columns) for _ in range(config.num_hidden_layers)])
        self.config = config
        self._newest_ids: Tensor | None = None
        # Of the present call of `generate`: (batch,) bool, rows that are padded from here on.
        self.ended_rows: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Tokens seen, padding included."""
        return self._columns.seen

    @property
    def states(self) -> tuple[Any, ...] | None:
        """The blocks' states, or None before the first token."""
        states = tuple(layer.state for layer in self.layers)
        return None if states[0] is None else states

    def store(self, states: tuple[Any, ...], num_columns: int, ids: Tensor | None = None) -> None:
        """Keep what the model returned for a stretch of `num_columns` tokens, padding included.

        The newest of its ids (batch, num_columns) are kept, too, if given: see `is_beginning_of`.
        """
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = map_state(Tensor.detach, state)
        if num_columns:
            known = None if self.num_columns and self._newest_ids is None else ids
            parts = [x for x in (self._newest_ids, known) if x is not None]
            self._newest_ids = None if known is None else torch.cat(parts, 1)[:, -_NUM_NEWEST:].clone()
        self._columns.seen += num_columns

    def is_beginning_of(self, ids: Tensor) -> bool:
        """Whether ids (batch, time) repeat what was seen, as far as the kept ids show, and continue it."""
        newest, seen = self._newest_ids, self.num_columns
        if newest is None or ids.shape[1] <= seen or ids.shape[0] != newest.shape[0]:
            return False
        return torch.equal(ids[:, seen - newest.shape[1] : seen].to(newest.device), newest)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included, since `begin_call` (or ever)."""
        return self.layers[layer_idx].get_seq_length()

    def begin_call(self, fresh: bool) -> None:
        """Count columns from here (fresh) or from the start: `generate` slices ids and masks by the count."""
        self._columns.before_call = self.num_columns if fresh else 0

    def check_fits(self, config: TitansConfig) -> None:
        """Whether a model of this configuration understands the states.

        Raises:
            ValueError: naming the first field that differs.
        """
        if config is self.config:
            return
        if found := _first_difference(self.config.state_fields(), config.state_fields()):
            raise ValueError(
                f"the cache was made with {found.name}={found.theirs!r}, the model has {found.ours!r}: use "
                "the model it was made with"
            )

    def _map(self, function: Any) -> None:
        for layer in self.layers:
            layer.state = map_state(function, layer.state)
        self._newest_ids = None if self._newest_ids is None else function(self._newest_ids)

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.state = None
        self._columns.seen = self._columns.before_call = 0
        self._newest_ids = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError(
            f"crop({tokens_to_remove}): a memory cannot unlearn its last tokens; clone() before reading them"
        )

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        """Rows held, or −1 before the first token."""
        return -1 if self.states is None else pytree.tree_leaves(self.states)[0].shape[0]

    def nbytes(self) -> int:
        """Bytes held by all states."""
        return state_nbytes(self.states)

    def clone(self) -> TitansCache:
        """An independent copy: both may go on reading."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> TitansCache:
        other = TitansCache(self.config)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            # States are never written in place, so sharing them is copying them.
            theirs.state = mine.state
        other._columns.seen, other._newest_ids = self.num_columns, self._newest_ids
        return other

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write the states to one safetensors file, through a temporary name.

        Raises:
            ValueError: before the first token.
        """
        if self.states is None:
            raise ValueError("the cache is empty: read something before saving it")
        positions = next(leaf for leaf in pytree.tree_leaves(self.states) if leaf.dtype == torch.int64)
        about = {
            **(metadata or {}),
            "config": json.dumps(self.config.state_fields()),
            "num_columns": str(self.num_columns),
            "tokens_per_row": json.dumps(positions.tolist()),
            "newest_ids": json.dumps(None if self._newest_ids is None else self._newest_ids.tolist()),
        }
        write_state_file(Path(path), dict(_named_leaves(self.states)), about)

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
        if found := _first_difference(saved, config.state_fields()):
            raise ValueError(
                f"{file.path} was written with {found.name}={found.theirs!r}, the model has {found.ours!r}: "
                "load it with the checkpoint it was made with"
            )
        template = _template(config)
        slots = _check_kinds(file, template)
        read = file.tensors()
        moved = {id(tensor): tensor.to(device) for tensor in read.values()}
        stored = {name: moved[id(tensor)] for name, tensor in read.items()}
        # Positions that are equal by chance must not be one tensor.
        tensors = {n: x if x.is_floating_point() else x.clone() for n, x in stored.items()}
        states = _as_states(file.path, tensors, template, slots, num_columns)
        cache = cls(config)
        cache.store(states, num_columns)
        cache._newest_ids = _saved_ids(file, cache.batch_size, config.vocab_size)
        return cache


def _saved_ids(file: StateFile, rows: int, vocab_size: int) -> Tensor | None:
    """The newest ids that a file's cache had seen, or None where it does not say.

    Raises:
        ValueError: if they are no ids of this model.
    """
    try:
        ids = json.loads(file.about.get("newest_ids", "null"))
        if ids is None:
            return None
        found = torch.tensor(ids, dtype=torch.int64)
        if (
            found.shape == (rows, min(found.shape[-1], _NUM_NEWEST))
            and ((found >= 0) & (found < vocab_size)).all()
        ):
            return found
    except (TypeError, ValueError, RuntimeError, RecursionError, OverflowError):
        pass
    raise damaged_header(file.path)


class _Difference(NamedTuple):
    """A field in which two states mean something else; `name` is dotted inside the memory's fields."""

    name: str
    theirs: Any
    ours: Any


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> _Difference | None:
    """The first of `TitansConfig.state_fields` in which two states differ, or None."""
    for name, own in ours.items():
        other = theirs.get(name)
        if isinstance(own, dict) and isinstance(other, dict):
            if inner := _first_difference(other, own):
                return inner._replace(name=f"{name}.{inner.name}")
        elif own != other:
            return _Difference(name, other, own)
    unknown = next(iter(theirs.keys() - ours.keys()), None)
    return None if unknown is None else _Difference(unknown, theirs[unknown], None)


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


def _named_leaves(states: Any) -> list[tuple[str, Tensor]]:
    # Anchors have their names in a file even where they are the weights.
    pairs, _ = pytree.tree_flatten_with_path(expanded(states))
    return [(pytree.keystr(path).lstrip("."), leaf) for path, leaf in pairs]


def _check_kinds(file: StateFile, template: tuple[Any, ...]) -> int:
    """Whether a file holds what such a model's states consist of; the slots of what grows with the text.

    Raises:
        ValueError: for a tensor too many or too few, or one of another shape or type.
    """
    named, kinds = _named_leaves(template), file.kinds
    if different := sorted({name for name, _ in named} ^ kinds.keys()):
        raise ValueError(
            f"{file.path} does not hold exactly the tensors of such a model: {different[0]} differs"
        )
    growing = _growing_leaves(template)
    slots = max((kinds[name].shape[1] for name in growing if len(kinds[name].shape) == 4), default=0)
    batch = next(iter(kinds[named[0][0]].shape), 0)
    for name, leaf in named:
        rest = (slots, *leaf.shape[2:]) if name in growing else leaf.shape[1:]
        _check_kind(file.path, name, kinds[name], (batch, *rest), leaf.dtype)
    return slots


def _as_states(
    path: str | Path, tensors: dict[str, Tensor], template: tuple[Any, ...], slots: int, num_columns: int
) -> tuple[Any, ...]:
    """A file's tensors as states; ValueError for numbers that no model could have written."""
    named = _named_leaves(template)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int64 and (tensor < 0).any():
            raise ValueError(f"{path}: {name} holds no valid positions; the memory is damaged")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the memory is damaged")
    positions = torch.stack([tensors[name] for name, leaf in named if leaf.dtype == torch.int64])
    if not positions.numel() or (positions != positions[0]).any() or positions.max() > num_columns:
        raise ValueError(f"{path}: its positions contradict each other; the memory is damaged")
    if _growing_leaves(template) and positions.max() > slots:
        raise ValueError(f"{path}: its positions reach beyond the keys it holds; the memory is damaged")
    structure = pytree.tree_structure(expanded(template))
    return compact(pytree.tree_unflatten([tensors[name] for name, _ in named], structure))


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

    def grows(state: Any) -> bool:
        return isinstance(state, FullAttentionState)

    pairs, _ = pytree.tree_flatten_with_path(states, is_leaf=grows)
    parts = [(path, part) for path, leaf in pairs if grows(leaf) for part in ("keys", "values")]
    return {f"{pytree.keystr(path)}.{part}".lstrip(".") for path, part in parts}


def _check_kind(path: Path, name: str, kind: Kind, shape: tuple[int, ...], least: torch.dtype) -> None:
    if kind.shape != shape:
        raise ValueError(f"{path}: {name} has shape {kind.shape}, the model needs {shape}")
    # A model may be narrower than float32, a memory never is.
    allowed = [torch.int64] if least == torch.int64 else [torch.float32, torch.float64]
    if least == torch.bfloat16:
        allowed += [torch.float16, torch.bfloat16]
    if kind.dtype not in allowed:
        raise ValueError(f"{path}: {name} has dtype {kind.dtype}, the model needs {allowed[0]}")
