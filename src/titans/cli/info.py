"""`titans info`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import isfinite, prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.info_model import describe_graft, describe_model
from titans.cli.terminal import printable
from titans.memory_file import MemoryFile, read_summary
from titans.state_header import damaged_header
from titans.zoo.by_name import or_by_name
from titans.zoo.checkpoint import config_fields, folder_of, load_config, load_titans

if TYPE_CHECKING:
    from titans.evaluate import KeyDimensions, LayerGates
    from titans.hf import TitansConfig

SAMPLE_TOKENS = 2048
# A smaller share of the width than this is said to be low.
_FEW_DIMENSIONS = 0.25
_KEYS_TABLE_WIDTH = 70

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "memory_depth", "memory_expansion", "chunk_size", "segment_length", "sliding_window",
    "num_persistent_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint folder, a graft, a model of transformers or a memory file contains.

    Example: titans info book.memory

    Of a checkpoint with a memory it also reports, from a sample of text, what the gates have learned: for
    each layer and head how many tokens it takes to forget half, and how hard tokens are written; and how many
    keys each layer can distinguish.
    """

    path: tyro.conf.Positional[Path]
    """Folder of a model or graft, the name of one that comes with the library, or a memory of `titans
    memorize`."""
    data: tuple[str, ...] | None = None
    """Corpora whose first 2048 tokens are the sample, each a text file, a folder of them, hf:NAME, or a
    built-in name: excerpt, shakespeare, bible. By default the excerpt."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Describe, to stderr."""
        if self.data == ():
            raise UsageError("data: none given; name at least one corpus")
        path = folder_of(self.path)
        if path.is_dir():
            about = _describe_checkpoint(path)
        elif path.is_file():
            about = _describe_memory(path)
        else:
            raise ValueError(
                f"path={str(path)!r} does not exist: give a checkpoint folder or a memory file{or_by_name()}"
            )
        has_memory = about["kind"] == "checkpoint" and load_config(path).has_memory
        if self.data is not None and not has_memory:
            raise UsageError(
                f"data with path={str(self.path)!r}: only a checkpoint with a memory reads a sample; leave "
                "the option out"
            )
        _show(about)
        if has_memory:
            about |= _measure(path, self.data or ("excerpt",))
            _show_gates(about["gates"])
            if about["keys"] is not None:
                _show_keys(about["keys"])
        if self.json:
            print(json.dumps(about))
        return 0


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    sizes = _parameter_sizes(folder)
    fields = config_fields(folder)
    if (kind := fields.get("model_type")) != "titans":
        describe = describe_graft if kind == "titans-graft" else describe_model
        return describe(folder, fields, sum(sizes.values()))
    config = load_config(folder)
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "variant": config.variant,
        "preset": _preset(config),
        "parameters": sum(sizes.values()),
        "embedding_parameters": sum(n for name, n in sizes.items() if "embed" in name or "lm_head" in name),
        **_sizes(config.to_dict()),
        **(_memory_parts(config.to_dict()) if config.has_memory else {}),
    }


def _describe_memory(path: Path) -> dict[str, Any]:
    memory = read_summary(path)
    if memory is None:
        from titans.stream import describe_memory

        memory = describe_memory(path)
    try:
        return _memory_facts(path, memory)
    except (KeyError, TypeError, AttributeError):
        raise damaged_header(path) from None


def _memory_facts(path: Path, memory: MemoryFile) -> dict[str, Any]:
    return {
        "kind": "memory",
        "path": str(path),
        # Of another causal model its type.
        "variant": memory.config.get("variant") or memory.config["model_type"],
        "tokens": memory.stats.tokens,
        "state_bytes": memory.stats.state_bytes,
        "file_bytes": path.stat().st_size,
        "model_fingerprint": memory.fingerprint,
        **_sizes(memory.config),
        **_memory_parts(memory.config, memory.sentence),
        "layers": [
            {name: norm for name, norm in asdict(layer).items() if norm is not None}
            for layer in memory.stats.layers
        ],
    }


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that are sizes, those of the memory too."""
    sizes = {name: config[name] for name in _SIZES if name in config}
    if (memory := config.get("memory")) is None:
        return sizes
    return {
        **sizes,
        "conv_kernel": memory["conv_kernel"],
        "memory_local_chunk_sizes": memory["local_chunk_sizes"],
        "memory_shard_length": memory["shard_length"],
    }


def _memory_parts(config: dict[str, Any], sentence: str | None = None) -> dict[str, Any]:
    """What its memory is made of, as far as it has names; nothing for a model of another kind.

    sentence: `memory_sentence` of it, where that is known already.
    """
    if (memory := config.get("memory")) is None:
        return {}
    if sentence is None:
        from titans.hf.memory_sentence import memory_sentence

        sentence = memory_sentence(config)
    rule = memory["rule"] or {"name": "momentum"}
    return {
        "memory": sentence,
        "memory_form": memory["form"].get("name"),
        "memory_objective": memory["objective"]["name"],
        "memory_rule": rule["name"],
    }


def _parameter_sizes(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of the checkpoint has, from the headers alone."""
    import safetensors

    if (folder / "parts").is_dir():
        from titans.hf import parts

        found = ((*name.partition("/")[::2], size) for name, size in parts.sizes(folder).items())
        return {name: prod(size) for kind, name, size in found if kind == parts.MODEL}
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
        if _sizes(preset.to_dict()) == _sizes(config.to_dict()):
            return name
    return None


def _measure(folder: Path, sources: tuple[str, ...]) -> dict[str, Any]:
    """What a sample shows of gates and keys."""
    model, tokenizer = load_titans(folder)
    from titans.cli.progress import ReadingProgress
    from titans.data import encode_document, load_corpus
    from titans.evaluate import gate_statistics, key_dimensions

    texts, left = [], SAMPLE_TOKENS
    for document in (document for source in sources for document in load_corpus(source)):
        if not left:
            break
        texts.append(encode_document(tokenizer, document.data, document.name)[:left])
        left -= len(texts[-1])
    tokens = SAMPLE_TOKENS - left
    with ReadingProgress(tokens) as progress:
        gates = gate_statistics(model, texts, progress=lambda done, _: progress.update(done, done))
    keys = key_dimensions(model, texts) if tokens > 1 else []
    sample = {"sample": list(sources), "tokens": tokens}
    return {
        "gates": sample | _described_gates(gates),
        "keys": sample | _described_keys(keys) if keys else None,
    }


def _described_gates(layers: list[LayerGates]) -> dict[str, Any]:
    """The fields of `LayerGates`, layers × heads × depth each.

    A half-life without end is None, which JSON can say.
    """

    def numbers(values: Any) -> Any:
        if isinstance(values, list):
            return [numbers(value) for value in values]
        return values if isfinite(values) else None

    names = [field.name for field in fields(layers[0])]
    return {name: [numbers(getattr(layer, name).tolist()) for layer in layers] for name in names}


def _described_keys(layers: list[KeyDimensions]) -> dict[str, Any]:
    """Effective dimensions, layers × heads, with the widths that they cannot exceed, and what they mean."""
    first = layers[0]
    hidden = [layer.hidden.tolist() for layer in layers if layer.hidden is not None]
    return {
        "width": first.key_width,
        "dimensions": [layer.keys.tolist() for layer in layers],
        "hidden_width": first.hidden_width,
        "hidden_dimensions": hidden or None,
        "reading": keys_reading(layers),
    }


def keys_reading(layers: list[KeyDimensions]) -> str:
    """What effective dimensions mean, in a sentence about their medians over layers and heads."""
    read = median(x for layer in layers for x in layer.read.tolist())
    keys = median(x for layer in layers for x in layer.keys.tolist())
    width = layers[0].read_width
    meaning = f"{read:.1f} of {width}: about so many pairs, written alike, are recalled from one head"
    if layers[0].hidden is not None and read < keys:
        return f"{meaning}; a linear memory of the same keys would recall more ({keys:.1f})"
    if read < _FEW_DIMENSIONS * width:
        return f"{meaning}; the keys of this text resemble each other or repeat"
    return meaning


def _show(about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in about.items():
        if name != "layers" and value is not None:
            shown = escape(printable(_shown(value)))
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


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def _show_gates(gates: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(printable(f"gates over {gates['tokens']:,} tokens of {', '.join(gates['sample'])}")),
        caption="half-lives in tokens: at rest, for an input of zero, and quantiles over the tokens; mean "
        "momentum; medians of the step size as applied and of write strength, step size / (1 − momentum); "
        "W: matrix of the memory",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    columns: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "at rest": ("half_life_at_rest", readable_tokens),
        "10 %": ("half_life_10", readable_tokens),
        "median": ("half_life_median", readable_tokens),
        "90 %": ("half_life_90", readable_tokens),
        "momentum": ("momentum_mean", "{:.2f}".format),
        "step size": ("step_size_median", "{:.2g}".format),
        "strength": ("write_strength_median", "{:.2g}".format),
    }
    for heading in ("layer", "head", "W", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, heads in enumerate(gates["half_life_at_rest"]):
        for head, depth in enumerate(heads):
            # One line in a row for each matrix of the memory.
            matrices = "\n".join(str(number + 1) for number in range(len(depth)))
            cells = ["\n".join(map(show, gates[name][layer][head])) for name, show in columns.values()]
            table.add_row(str(layer), str(head), matrices, *cells)
        table.add_section()
    Console(stderr=True).print(table)


def _show_keys(keys: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    source = f"{keys['tokens']:,} tokens of {', '.join(keys['sample'])}"
    table = Table(
        title=escape(printable(f"effective dimensions over {source}")),
        caption="1 / mean cos² over pairs of tokens: the median head, and lowest to highest",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 0, 0, 1),
        min_width=_KEYS_TABLE_WIDTH,
    )
    parts = [(f"keys (of {keys['width']})", keys["dimensions"])]
    if keys["hidden_width"] is not None:
        parts.append((f"hidden features (of {keys['hidden_width']})", keys["hidden_dimensions"]))
    for heading in ("layer", *(heading for heading, _ in parts)):
        table.add_column(heading, justify="right")
    for layer in range(len(keys["dimensions"])):
        heads = [found[layer] for _, found in parts]
        cells = [f"{median(x):.1f} ({min(x):.1f}–{max(x):.1f})" for x in heads]
        table.add_row(str(layer), *cells)
    console = Console(stderr=True)
    console.print(table)
    console.print(f"Effective dimensions, median of all heads: {keys['reading']}.", highlight=False)


def readable_tokens(tokens: float | None) -> str:
    """64, 1.2k, 1.0M; ∞ for None."""
    if tokens is None:
        return "∞"
    for unit in ("", "k", "M", "G", "T"):
        if tokens < 999.5:
            return f"{tokens:.1f}{unit}" if tokens < 9.95 else f"{tokens:.0f}{unit}"
        tokens /= 1000
    return f"{1000 * tokens:.0e}T"
