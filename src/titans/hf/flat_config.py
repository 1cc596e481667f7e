"""Configurations of before the memory had one of its own, when its fields were flat, such as `memory_norm`.

Checkpoints and memory files still hold such fields; new code does not take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titans.nn.memory.form import FORMS
from titans.nn.memory.half_lives import HALF_LIVES

# Old name → its place in `TitansConfig.memory`.
_PLACES: dict[str, tuple[str, ...]] = {
    "conv_kernel": ("conv_kernel",),
    "memory_combination": ("combination",),
    "memory_local_chunk_sizes": ("local_chunk_sizes",),
    "memory_shard_length": ("shard_length",),
    "memory_induction_init": ("start",),
    "memory_shortest_half_life": ("half_lives",),
    "memory_longest_half_life": ("half_lives",),
    **{f"memory_{name}": ("form", name) for name in vars(FORMS["stable"])},
}
_UNIT_ROWS = "memory_unit_rows"


def remedy(name: str) -> str | None:
    """What to write instead of an old field, or None for a name that was none."""
    if name == _UNIT_ROWS:
        return "rows of unit length are gone; a form's row_limit bounds them"
    if name not in _PLACES:
        return None
    value = "…"
    for part in reversed(_PLACES[name]):
        value = f'{{"{part}": {value}}}'
    return f"give memory={value}"


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TitansConfig` from saved ones, which may be flat; others are left unchanged.

    Raises:
        ValueError: for a flat field that no configuration can express any more, or flat and nested ones in
            one configuration.
    """
    old = [name for name in (*_PLACES, _UNIT_ROWS) if name in fields]
    kept = {name: value for name, value in fields.items() if name not in old}
    if not old:
        return kept
    if "memory" in fields:
        raise ValueError(f"{old[0]} and memory are both given: {remedy(old[0])} alone")
    if fields.get(_UNIT_ROWS):
        raise ValueError(
            f"{_UNIT_ROWS}=True: rows of unit length are gone, so this model cannot be run any more; train "
            "one whose form has a row_limit"
        )
    form: dict[str, Any] = {"name": "stable"}
    memory: dict[str, Any] = {"form": form}
    for name in old:
        if name == "memory_induction_init":
            memory["start"] = "induction" if fields[name] else "random"
        elif name in _PLACES and _PLACES[name] != ("half_lives",):
            *outer, inner = _PLACES[name]
            (form if outer else memory)[inner] = fields[name]
    half_lives = ("memory_shortest_half_life", "memory_longest_half_life")
    if {*half_lives} & {*old}:
        memory["half_lives"] = [
            fields.get(name, usual) for name, usual in zip(half_lives, HALF_LIVES, strict=True)
        ]
    return {**kept, "memory": memory}
