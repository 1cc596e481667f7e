"""A model as one of EleutherAI's lm-evaluation-harness, whose tasks can then be run on it.

The harness comes with the extra `eval` alone; version 0.4.13 was tried.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from titans.data import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.hf import TitansForCausalLM

LONGEST_REQUEST = 2**20
_NEVER_IN_A_TEXT = 0
_NEWLINE = 10


def as_lm(
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = LONGEST_REQUEST,
) -> Any:
    """An `lm_eval.models.huggingface.HFLM` of a model, as `titans.load` gives it with its tokenizer:
    `lm_eval.simple_evaluate(model=as_lm(*titans.load("titans-lmm-tiny")), tasks=["lambada_openai"])`.

    A request is read in one call, so its activations, not the model, bound its length. A byte model has no
    special tokens: byte 0 pads and ends an answer, and what has no context is predicted after a line's end.

    Args:
        batch_size: requests side by side; the harness's "auto" would try `max_length` tokens.
        max_length: tokens of a request, the answer included. A Titans model has no bound; this one is above
            what tasks ask, so that nothing is cut. Of longer requests the harness drops the beginning, and
            longer documents it predicts in windows.

    Raises:
        ImportError: where the harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ImportError("lm_eval is not installed: pip install lm_eval", name="lm_eval") from None
    prefix = None
    if is_byte_tokenizer(tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token_id = tokenizer.eos_token_id = _NEVER_IN_A_TEXT
        prefix = _NEWLINE
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        prefix_token_id=prefix,
    )
