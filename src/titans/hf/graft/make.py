"""`titans.graft`: a graft from a pretrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.configuration import GraftConfig, memory_settings, origin_of
from titans.hf.graft.lora import is_lora
from titans.hf.graft.memories import MEMORIES
from titans.hf.graft.modeling import GraftedForCausalLM
from titans.hf.graft.window import Window


def graft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    window: int = 512,
    sinks: int = 4,
    adaptation: bool | dict[str, Any] = True,
    association: bool | dict[str, Any] | None = None,
    residual: bool | dict[str, Any] | None = None,
    lora: bool | dict[str, Any] | None = None,
    **others: bool | dict[str, Any] | None,
) -> GraftedForCausalLM:
    """Give a pretrained model a sliding window, and memories that learn during reading.

    Args:
        model: a causal LM of transformers with rotary positions. It becomes part of the graft, its parameters
            frozen; with `lora` it is unchanged, and the graft has a copy that shares its weights.
        tokenizer: saved with the graft.
        window: tokens that attention sees: a token's own block of window / 2 tokens, and the previous block.
            In a text of at most this many tokens a graft without memories gives the model's own logits.
        sinks: first tokens of the text that every token sees.
        adaptation: a memory that learns by the model's own loss; settings of
            `titans.nn.adaptation.Adaptation` as a dict.
        association: a memory that recalls which word followed a context; settings of
            `titans.nn.association.Association` as a dict. It changes no logits until it is trained.
        residual: memories inside the model, whose answers are added to the states after chosen layers;
            `layers` and settings of `titans.NeuralMemory` as a dict. They add 0 until they are trained
            through the model.
        lora: low-rank changes of the model's linear layers, by peft; `rank` (8), `alpha` (16) and `targets`
            ("all-linear", or names) as a dict. They are 0 until they are trained.
        others: memories that were added to `MEMORIES`, by name.

    Returns a model in evaluation mode, for `titans.Session`, `generate` and the call with ids.

    Raises:
        ValueError: for a model that cannot be grafted, with the reason, or sizes that make no window.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}: give the model of transformers itself; merge adapters into "
            "it first"
        )
    if isinstance(model, GraftedForCausalLM) or model.config.model_type == "titans":
        raise ValueError(f"model is a {type(model).__name__}, which has a memory of its own")
    if adapted := next((name for name, _ in model.named_parameters() if is_lora(name)), None):
        raise ValueError(
            f"model is a {type(model).__name__} with adapters in its layers ({adapted}): merge them into it "
            "first, or load it anew"
        )
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: give the model's own"
        )
    if tokenizer is not None:
        _check_vocabulary(model, tokenizer)
    # Refuses a model that cannot be grafted, before the cost of looking at the head's rows.
    windowed = WindowedBase(model, Window(window, sinks))
    asked = {"adaptation": adaptation, "association": association, "residual": residual, **others}
    settings: dict[str, dict[str, Any]] = {}
    for name, given in asked.items():
        if name not in MEMORIES:
            raise ValueError(f"{name}={given!r}: there is no such memory; choose from {', '.join(MEMORIES)}")
        if given is not None and given is not False:
            measured = MEMORIES[name].measured(windowed)
            settings[name] = memory_settings(name, {} if given is True else given, measured)
    if lora is not None and lora is not False:
        settings["lora"] = {} if lora is True else lora
    grafted = GraftedForCausalLM(
        GraftConfig(window, sinks, origin=origin_of(model), **settings), model
    ).eval()
    grafted.tokenizer = tokenizer
    return grafted


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer without the tokens that stand in the model's folder, if it has one that says."""
    path = Path(model.config.name_or_path or "no folder") / "tokenizer.json"
    try:
        known = json.loads(path.read_bytes())["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if not isinstance(known, dict) or not hasattr(tokenizer, "get_vocab"):
        return
    own = tokenizer.get_vocab()
    for token, number in known.items():
        if own.get(token) != number:
            raise ValueError(
                f"tokenizer has {own.get(token)} for {token!r}, the one in {path.parent} has {number}: give "
                "the model's own"
            )
