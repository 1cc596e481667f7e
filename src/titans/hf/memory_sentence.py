"""The form of a memory in a sentence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from titans.nn.memory import FORMS, MemoryForm
from titans.nn.memory.features import IDENTITY, feature_width

_COUNTS = {2: "two", 3: "three", 4: "four"}
_KEPT = {"log": "by powers of two", "linear": "all"}
_ACTIVATIONS = {"gelu": "GELU", "silu": "SiLU", "sin": "sine"}


def memory_sentence(config: dict[str, Any]) -> str:
    """What the memory of a model of this configuration (as a dict) is, in a few words.

    "linear", "sin features" or "two layers, SiLU"; the form, with the fields that differ from what its name
    stands for; heads, and the shape of the fast weights of each, answer × key, or from layer to layer.
    """
    memory, depth, head_dim = config["memory"], config["memory_depth"], config["head_dim"]
    form = MemoryForm.of(memory["form"])
    if depth > 1:
        widths = [head_dim, *[config["memory_expansion"] * head_dim] * (depth - 1), head_dim]
        count = _COUNTS.get(depth, str(depth))
        network = f"{count} layers, {_ACTIVATIONS.get(form.activation, form.activation)}"
        shape = " → ".join(map(str, widths))
    elif memory["features"] == IDENTITY:
        network, shape = "linear", f"{head_dim} × {head_dim}"
    else:
        width = feature_width(memory["features"], memory["feature_size"], head_dim)
        network, shape = f"{memory['features']} features", f"{head_dim} × {width}"
    name = memory["form"].get("name", "stable")
    changed = [
        f"{field.name}={getattr(form, field.name)}"
        for field in fields(form)
        if field.name != "activation"
        if getattr(form, field.name) != getattr(FORMS[name], field.name)
    ]
    parts = [network, f"{name} form" + (f" with {' and '.join(changed)}" if changed else "")]
    parts.append(f"{config['num_attention_heads']} heads of {shape}")
    if sizes := memory["local_chunk_sizes"]:
        parts.append(f"each with {len(sizes)} local memor{'ies' if len(sizes) > 1 else 'y'}")
    if config["variant"] == "hope":
        parts.append("a chain of them after memories that modify themselves")
    if caching := memory.get("caching"):
        parts.append(f"a checkpoint every {caching['every']} tokens, kept {_KEPT[caching['keep']]}")
    return ", ".join(parts)
