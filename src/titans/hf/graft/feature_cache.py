"""What a frozen base computes for many texts, on disk: hidden states, and its log-normaliser. Resumable.

A folder holds index.json and one safetensors file for each unit, named by the hash of its tokens. A unit is
one document, or several rows of blocks; its parts (such as "statements" and "questions") are read apart, each
from its first token. A part has these tensors, for b rows of t tokens:

    PART.ids (b, t) int32            the tokens
    PART.flags (b, t) uint8          of the caller, such as which tokens answer a question
    PART.state.L (b, t, hidden)      float16, the hidden state after layer L, for each chosen layer
    PART.hidden (b, t, hidden)       float16, what the head gets
    PART.normaliser (b, t) float32   log of the sum of the exponentials of the base's logits, in nats

Its header says what the caller wrote about the unit, and of which base, window and layers it is. A file
exists once it is complete, so that a folder can be read while it grows, and is continued after an
interruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans.hf.fingerprint import weights_name
from titans.hf.graft.base import WindowedBase

logger = logging.getLogger(__name__)

_INDEX = "index.json"
_FORMAT = 1
# The head makes the logits of so many tokens at once.
_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Unit:
    """What one file is about.

    group: a name for units of a kind, such as "facts". parts: for each name ids and flags, (rows, time) of
    whole numbers; flags below 256. about: JSON of the caller, which stands in the file's header.
    """

    group: str
    parts: Mapping[str, tuple[Tensor, Tensor]]
    about: str = ""

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids, _ in self.parts.values())

    def digest(self) -> str:
        """A name for these tokens and flags."""
        digest = hashlib.sha256()
        for name, (ids, flags) in sorted(self.parts.items()):
            digest.update(f"{name}{tuple(ids.shape)}".encode())
            digest.update(ids.to(torch.int32).contiguous().numpy().tobytes())
            digest.update(flags.to(torch.uint8).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Features:
    """A part of a unit as it was read.

    states: for each layer (rows, time, hidden), float16; hidden, likewise. ids: (rows, time) int64. flags:
    (rows, time) uint8. normaliser: (rows, time) float32, nats.
    """

    states: tuple[Tensor, ...]
    hidden: Tensor
    ids: Tensor
    flags: Tensor
    normaliser: Tensor


@dataclass(frozen=True)
class FeatureProgress:
    """tokens read of total, tokens per second of this run, and the seconds left; done: units."""

    tokens: int
    total: int
    rate: float
    seconds_left: float
    done: int
    units: int


def bytes_per_token(hidden_size: int, layers: Sequence[int]) -> int:
    """What a token takes on disk."""
    return 2 * hidden_size * (len(layers) + 1) + 4 + 1 + 4


def write_features(
    base: WindowedBase,
    units: Sequence[Unit],
    folder: Path,
    layers: Sequence[int],
    progress: Callable[[FeatureProgress], None] = lambda _: None,
) -> FeatureCache:
    """Read all units, in their order, and write what the base computes; units that are there are kept.

    Args:
        layers: indices of the base's layers, the states after which are kept; there may be none.
        progress: called after each unit.

    Raises:
        ValueError: for a folder, or a file in it, of another base, window or layers, for layers that the base
            lacks, or states that float16 cannot hold.
        OSError: if the folder cannot be written.
    """
    count = base.num_layers
    if list(layers) != sorted({*layers}) or any(not 0 <= layer < count for layer in layers):
        raise ValueError(f"layers={tuple(layers)!r}: give rising indices from 0 to {count - 1}")
    key = {**_key_of(base), "layers": list(layers)}
    folder.mkdir(parents=True, exist_ok=True)
    plan = [
        {"file": f"{unit.group}-{unit.digest()}.safetensors", "group": unit.group, "tokens": unit.tokens}
        for unit in units
    ]
    _check_key(folder, key)
    _write_index(folder, {"format": _FORMAT, "key": key, "units": plan})
    total = sum(unit.tokens for unit in units)
    done = sum(
        unit.tokens for unit, entry in zip(units, plan, strict=True) if (folder / entry["file"]).exists()
    )
    read, began = 0, time.perf_counter()
    for number, (unit, entry) in enumerate(zip(units, plan, strict=True), 1):
        path = folder / entry["file"]
        if path.exists():
            with _opened(path, key):
                continue
        _write(_read(base, unit, layers), path, unit.about, total - done, key)
        read, done = read + unit.tokens, done + unit.tokens
        rate = read / max(time.perf_counter() - began, 1e-9)
        progress(FeatureProgress(done, total, rate, (total - done) / rate, number, len(units)))
    return FeatureCache(folder)


class FeatureCache:
    """A folder of features, complete or growing.

    Args:
        layers: of those whose states are there, which are loaded; None for all.

    Raises:
        ValueError: for a folder that holds none, or lacks a layer.
    """

    def __init__(self, folder: Path, layers: Sequence[int] | None = None) -> None:
        self.folder = folder
        index = _index_of(folder)
        if index is None:
            raise ValueError(f"{folder} has no {_INDEX}: give a folder of cached features")
        self.key: dict[str, Any] = index["key"]
        self.layers = tuple(self.key["layers"] if layers is None else layers)
        if missing := [layer for layer in self.layers if layer not in self.key["layers"]]:
            raise ValueError(
                f"{folder} has no layer {missing[0]}: it has {self.key['layers']}; cache it, too"
            )
        self._units = index["units"]

    def check_base(self, base: WindowedBase) -> None:
        """Whether these features are of this base in this window.

        Raises:
            ValueError: naming what differs, or the file that is of another, or that not all features are
                there.
        """
        _check_key(self.folder, {**_key_of(base), "layers": self.key["layers"]})
        paths = [self.folder / entry["file"] for entry in self._units]
        if missing := sum(not path.exists() for path in paths):
            raise ValueError(
                f"{self.folder} lacks {missing} of {len(self._units)} files: finish caching first"
            )
        for path in paths:
            with _opened(path, self.key):
                pass

    def check_groups(self, *groups: str) -> None:
        """ValueError, naming the first of these groups of which there is no complete file."""
        for group in groups:
            if not self.files(group):
                raise ValueError(f"{self.folder} holds no features of {group}: finish caching")

    def groups(self) -> list[str]:
        """Names of the kinds of units."""
        return list(dict.fromkeys(entry["group"] for entry in self._units))

    def files(self, group: str) -> list[Path]:
        """The files of a group that are complete, in their order."""
        paths = (self.folder / entry["file"] for entry in self._units if entry["group"] == group)
        return [path for path in paths if path.exists()]

    def load(self, path: Path, rows: slice = slice(None), tokens: slice = slice(None)) -> dict[str, Features]:
        """The parts of one file, of which only some rows and tokens need be read.

        Raises:
            ValueError: if it is damaged, or of another base, window or layers than its folder.
        """
        with _opened(path, self.key) as file:
            left_out = {f"state.{layer}" for layer in self.key["layers"] if layer not in self.layers}
            names = [name for name in file.keys() if name.partition(".")[2] not in left_out]  # noqa: SIM118
            found = {name: file.get_slice(name)[rows, tokens] for name in names}
        for name, value in found.items():
            if not value.isfinite().all():
                raise ValueError(f"{path} holds NaN or infinite values ({name}): remove it, and cache again")
        return {
            part: Features(
                tuple(found[f"{part}.state.{layer}"] for layer in self.layers),
                found[f"{part}.hidden"],
                found[f"{part}.ids"].long(),
                found[f"{part}.flags"],
                found[f"{part}.normaliser"],
            )
            for part in sorted({name.partition(".")[0] for name in found})
        }

    def shape(self, path: Path) -> tuple[int, int]:
        """Rows and tokens of each part of a file, whose parts are alike; ValueError if it is damaged."""
        with _opened(path, self.key) as file:
            name = next(name for name in file.keys() if name.endswith(".ids"))  # noqa: SIM118
            rows, tokens = file.get_slice(name).get_shape()
        return int(rows), int(tokens)

    def about(self, path: Path) -> str:
        """What the caller wrote about this unit; ValueError if the file is damaged."""
        with _opened(path, self.key) as file:
            return str(_header(file)["about"])


@contextmanager
def _opened(path: Path, key: Mapping[str, Any]) -> Iterator[Any]:
    """An open file; ValueError if it is damaged, or has another key than its folder."""
    try:
        with safe_open(path, "pt") as file:
            for name, value in _header(file)["key"].items():
                if key.get(name) != value:
                    raise ValueError(
                        f"{path} holds features with {name}={value!r}, its folder those with "
                        f"{name}={key.get(name)!r}: remove the file, and cache again"
                    )
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, and cache again") from None


def _header(file: Any) -> dict[str, Any]:
    """ "about" and "key" of an open file; the key of one from before files had any is empty."""
    found = file.metadata() or {}
    return json.loads(found["unit"]) if "unit" in found else {"about": found.get("about", ""), "key": {}}


def _key_of(base: WindowedBase) -> dict[str, Any]:
    return {
        "base": weights_name(base.model),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "window": base.window.size,
        "sinks": base.window.sinks,
        "hidden_size": base.head.weight.shape[1],
    }


@torch.inference_mode()
def _read(base: WindowedBase, unit: Unit, layers: Sequence[int]) -> dict[str, Tensor]:
    tensors = {}
    device = base.head.weight.device
    for part, (ids, flags) in unit.parts.items():
        hidden, states, _ = base.read_layers(
            ids.long().to(device), base.initial_state(len(ids)), layers=layers
        )
        found = {f"state.{layer}": state for layer, state in zip(layers, states, strict=True)}
        found["hidden"] = hidden
        for name, value in found.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"the base computes NaN or infinite values ({name} of {unit.group}, which begins with "
                    f"the tokens {ids[0, :8].tolist()}): load it in float32, or leave that text out"
                )
            narrow = value.to(torch.float16)
            if not narrow.isfinite().all():
                raise ValueError(f"{name} of the base exceeds float16's range: choose other layers")
            tensors[f"{part}.{name}"] = narrow.cpu().contiguous()
        # Of the rounded states, which are what training sees.
        rounded = tensors[f"{part}.hidden"].flatten(0, 1).to(device)
        pieces = [base.head.logits(piece).float().logsumexp(-1) for piece in rounded.split(_TOKENS_AT_ONCE)]
        tensors[f"{part}.normaliser"] = torch.cat(pieces).view(ids.shape).cpu()
        tensors[f"{part}.ids"] = ids.to(torch.int32).contiguous()
        tensors[f"{part}.flags"] = flags.to(torch.uint8).contiguous()
    return tensors


def _write(tensors: dict[str, Tensor], path: Path, about: str, tokens_left: int, key: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        # One entry: several are written in no fixed order, and the same features are the same bytes.
        save_file(tensors, temporary, {"unit": json.dumps({"about": about, "key": key})})
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        needed = tokens_left * bytes_per_token(key["hidden_size"], key["layers"]) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"{path} could not be written ({error}): {needed:,.0f} MB are needed, {free:,.0f} MB are free; "
            "make room and start again, which continues"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _index_of(folder: Path) -> dict[str, Any] | None:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and cache again") from None
    if not isinstance(index, dict) or index.get("format") != _FORMAT or not {"key", "units"} <= index.keys():
        raise ValueError(f"{path} is of another format: give an empty folder")
    return index


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    """Refuse a folder that was begun with another base, window or layers."""
    index = _index_of(folder)
    for name, value in {} if index is None else index["key"].items():
        if key.get(name) != value:
            raise ValueError(
                f"{folder} holds features with {name}={value!r}, now it is {key.get(name)!r}: give another "
                "folder"
            )


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    temporary = folder / f".{_INDEX}.part"
    try:
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        temporary.replace(folder / _INDEX)
    except OSError as error:
        raise OSError(
            f"{folder / _INDEX} could not be written ({error}): make room and start again, which continues"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
