"""`titans.graft`: a graft from a pretrained model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.configuration import GraftConfig, memory_settings, origin_of
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
) -> GraftedForCausalLM:
    """Give a pretrained model a sliding window, and memories that learn during reading.

    Args:
        model: a causal LM of transformers with rotary positions. It becomes part of the graft, its parameters
            frozen.
        tokenizer: saved with the graft.
        window: tokens that attention sees: a token's own block of window / 2 tokens, and the previous block.
            In a text of at most this many tokens a graft without memories gives the model's own logits.
        sinks: first tokens of the text that every token sees.
        adaptation: a memory that learns by the model's own loss; settings of
            `titans.nn.adaptation.Adaptation` as a dict.
        association: a memory that recalls which word followed a context; settings of
            `titans.nn.association.Association` as a dict. It changes no logits until it is trained.

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
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: give the model's own"
        )
    # Refuses a model that cannot be grafted, before the cost of looking at the head's rows.
    windowed = WindowedBase(model, Window(window, sinks))
    settings: dict[str, dict[str, Any]] = {}
    if adaptation is not False:
        measured: dict[str, Any] = {"row_variance": windowed.head.row_variance()}
        settings["adaptation"] = memory_settings("adaptation", _given(adaptation), measured)
    if association is not False and association is not None:
        measured = {"layers": _layers_to_read(windowed.num_layers)}
        settings["association"] = memory_settings("association", _given(association), measured)
    grafted = GraftedForCausalLM(
        GraftConfig(window, sinks, origin=origin_of(model), **settings), model
    ).eval()
    grafted.tokenizer = tokenizer
    return grafted


def _given(settings: bool | dict[str, Any]) -> Any:
    return {} if settings is True else settings


def _layers_to_read(count: int) -> list[int]:
    """Of `count` layers those that an association reads: 16 and 24 of 30."""
    return sorted({min(count - 1, round(count * share / 30)) for share in (16, 24)})
