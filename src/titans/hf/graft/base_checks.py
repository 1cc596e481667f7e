"""What a base model must be: checks of its parts, and a trial with a few tokens."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from titans.hf.graft.base_cache import BaseCache, call_at, sliding_layers
from titans.hf.graft.rotation import Move, Rotation, rotations
from titans.hf.graft.window import Window
from titans.nn.adaptation import LinearHead

# Frequencies of these kinds of rotary positions depend on the length of the text.
_DEPEND_ON_LENGTH = ("dynamic", "longrope")
_TRIAL_LENGTH = 6
# Relative differences up to which rounding is the cause, in float32 and in half precision: of one operation,
# and of all layers, where it grows (SmolLM2-135M in bfloat16: 0.13). A real mismatch differs by 0.7 to 1.4.
_ALLOWED, _ALLOWED_OF_ALL_LAYERS = (0.01, 0.05), (0.01, 0.4)


@dataclass(frozen=True)
class Layers:
    """Results of the trial for each layer of a base: how its keys are rotated, and the shapes of its keys and
    values, (heads, head_dim)."""

    rotations: tuple[Rotation | None, ...]
    shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]


# Results of the trial, for each model and window.
_TRIED: WeakKeyDictionary[PreTrainedModel, dict[Window, Layers]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BaseParts:
    """A model that passes the checks that need no window, and what a reader takes of it.

    config: of its text. sliding: for each layer whether it has a sliding window of its own.
    """

    model: PreTrainedModel
    config: Any
    decoder: Any
    rotary: nn.Module
    sliding: list[bool]
    head: LinearHead


def parts_of(model: PreTrainedModel) -> BaseParts:
    """The parts of a model; ValueError for one that cannot be read so, with the reason."""
    config = model.config.get_text_config(decoder=True)
    _check_kind(model, config)
    decoder: Any = model.get_decoder()
    rotary = _rotary_of(decoder, config)
    return BaseParts(model, config, decoder, rotary, sliding_layers(config), _head_of(model, config))


def tried(parts: BaseParts, window: Window) -> Layers:
    """Results of the trial, which is made once for a model and a window.

    Raises:
        ValueError: for a model that cannot be read with this window, with the reason.
    """
    _check_positions(parts.config, window)
    known = _TRIED.setdefault(parts.model, {})
    if window not in known:
        known[window] = _try_out(parts, window.block)
    return known[window]


def _check_kind(model: PreTrainedModel, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or not isinstance(model, PreTrainedModel):
        raise ValueError("it is not a causal model of transformers")
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise ValueError("its weights are quantised; load it without quantisation")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("its weights are offloaded; load it without offloading")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError("its forward has no past_key_values: its layers cache no keys and values")
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError("its language-modelling head is not a linear layer")


def _rotary_of(decoder: Any, config: Any) -> nn.Module:
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise ValueError(
            "it has no module rotary_emb: its positions are not rotary, so that cached keys cannot be "
            "moved when the window slides"
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    for kind in kinds:
        if kind.get("rope_type") in _DEPEND_ON_LENGTH:
            raise ValueError(
                f"the frequencies of its rotary positions depend on the length of the text "
                f"(rope_type={kind['rope_type']!r}), so keys cannot move"
            )
    return rotary


def _check_positions(config: Any, window: Window) -> None:
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and window.most_positions > most:
        fits = max((most - window.sinks) // 2 * 2, 2)
        raise ValueError(
            f"window={window.size} and sinks={window.sinks} need {window.most_positions} "
            f"positions, and it has max_position_embeddings={most}; give a smaller window, as "
            f"titans.graft(model, tokenizer, window={fits}) does; commands take the folder that its "
            "save_pretrained(folder) writes"
        )


@torch.no_grad()
def _try_out(parts: BaseParts, distance: int) -> Layers:
    """Read a few tokens at two positions, and find the rotation between their keys."""
    model, rotary = parts.model, parts.rotary
    embeddings: Any = model.get_input_embeddings().weight
    device, vocab_size = embeddings.device, parts.config.vocab_size
    ids = (7 * torch.arange(_TRIAL_LENGTH, device=device) + 1).remainder(vocab_size)[None]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        (near, keys, values), (far, far_keys, _) = (
            call_at(
                parts.decoder,
                torch.tensor([place], device=device),
                {"input_ids": ids},
                BaseCache(parts.sliding),
            )
            for place in (0, distance)
        )
        logits = model(ids, use_cache=False).logits
    # An unsuitable model may raise any of these.
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise ValueError((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
    finally:
        for module in training:
            module.training = True
    if not logits.isfinite().all():
        raise ValueError("its logits hold NaN or infinite values")
    half = int(model.dtype in (torch.float16, torch.bfloat16))
    if not _difference(parts.head.logits(near), logits) <= _ALLOWED[half]:
        raise ValueError("its logits are not those of its head alone (an unknown operation follows the head)")
    if not _difference(far, near) <= _ALLOWED_OF_ALL_LAYERS[half]:
        raise ValueError("its hidden states depend on the absolute position, not only on rotary positions")
    types = list(getattr(parts.config, "layer_types", None) or [])
    kinds: list[Rotation | None] = [*rotations(rotary, types), None]
    found, back = [], Move(rotary, -distance)
    for index, (here, there) in enumerate(zip(keys, far_keys, strict=True)):
        # The first token sees itself alone, wherever it stands: its keys differ by their rotation only.
        here, there = here[:, :, :1], there[:, :, :1]
        errors = [_difference(back(there, kind), here) for kind in kinds]
        best = min(range(len(kinds)), key=errors.__getitem__)
        if not errors[best] <= _ALLOWED[half]:
            raise ValueError(f"the keys of layer {index} are rotated in an unknown way")
        found.append(kinds[best])
    shapes = tuple(
        ((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in zip(keys, values, strict=True)
    )
    return Layers(tuple(found), shapes)


def _head_of(model: PreTrainedModel, config: Any) -> LinearHead:
    """The head, with the scale or softcap that some models apply to its logits."""
    linear = cast("nn.Linear", model.get_output_embeddings())
    scale = getattr(config, "logit_scale", None) or 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale /= divisor
    return LinearHead(linear.weight, linear.bias, getattr(config, "final_logit_softcapping", None), scale)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, infinite for another shape."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
