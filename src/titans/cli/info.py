"""`titans info`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from titans.cli.checkpoint import load_config

if TYPE_CHECKING:
    from titans.hf import TitansConfig

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "memory_depth", "memory_expansion", "chunk_size", "segment_length", "sliding_window",
    "num_persistent_tokens", "conv_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint folder or a memory file contains.

    Example: titans info book.memory
    """

    path: tyro.conf.Positional[Path]
    """Folder of a model, or a memory written by `titans memorize`."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Describe, to stderr."""
        if self.path.is_dir():
            about = _describe_checkpoint(self.path)
        elif self.path.is_file():
            about = _describe_memory(self.path)
        else:
            raise ValueError(
                f"path={str(self.path)!r} does not exist: give a checkpoint folder or a memory file"
            )
        _show(about)
        if self.json:
            print(json.dumps(about))
        return 0


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    config = load_config(folder)
    sizes = _parameter_sizes(folder)
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "variant": config.variant,
        "preset": _preset(config),
        "parameters": sum(sizes.values()),
        "embedding_parameters": sum(n for name, n in sizes.items() if "embed" in name or "lm_head" in name),
        **{name: getattr(config, name) for name in _SIZES},
    }


def _describe_memory(path: Path) -> dict[str, Any]:
    from titans.stream import describe_memory

    memory = describe_memory(path)
    return {
        "kind": "memory",
        "path": str(path),
        "variant": memory.config["variant"],
        "tokens": memory.stats.tokens,
        "state_bytes": memory.stats.state_bytes,
        "file_bytes": path.stat().st_size,
        "fingerprint": memory.fingerprint,
        **{name: memory.config[name] for name in _SIZES if name in memory.config},
        "layers": [
            {name: norm for name, norm in asdict(layer).items() if norm is not None}
            for layer in memory.stats.layers
        ],
    }


def _parameter_sizes(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of the checkpoint has, from the headers alone."""
    import safetensors

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(
            f"checkpoint={str(folder)!r} has no model.safetensors: give a folder of `titans train`"
        )
    sizes: dict[str, int] = {}
    for path in files:
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                names = file.keys()
                sizes |= {name: prod(file.get_slice(name).get_shape()) for name in names}
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}): copy the folder again, or use an older checkpoint"
            ) from None
    return sizes


def _preset(config: TitansConfig) -> str | None:
    """The preset that has these sizes, if any."""
    from titans.hf import PRESETS

    for name in PRESETS:
        preset = type(config).from_preset(name, variant=config.variant)
        if all(getattr(preset, size) == getattr(config, size) for size in _SIZES):
            return name
    return None


def _show(about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in about.items():
        if name != "layers":
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            table.add_row(name.replace("_", " "), shown)
    console = Console(stderr=True)
    console.print(table)
    if about.get("layers"):
        norms = Table("layer", title="norms of the memories")
        for name in about["layers"][0]:
            norms.add_column(name.replace("_", " "), justify="right")
        for index, layer in enumerate(about["layers"]):
            norms.add_row(str(index), *(f"{norm:.4f}" for norm in layer.values()))
        console.print(norms)
