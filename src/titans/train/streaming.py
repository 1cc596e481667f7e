"""The examples of a run whose corpora are streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from titans.data import Document, DocumentSource, StreamDataset, encode_document, open_source
from titans.data.sources import Weighted
from titans.data.split import is_held_out
from titans.train.insertions import with_insertions
from titans.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def streamed(
    settings: TrainSettings,
    corpora: Sequence[Weighted],
    tokenizer: PreTrainedTokenizerBase,
    rows: range,
) -> tuple[StreamDataset, list[Document]]:
    """Training examples and held-out documents.

    Memories that are carried over from step to step begin anew with every document, and examples end where it
    ends; others are packed with one document after the other. About `hold_out` of all documents are never
    trained on, and those that come first are read for evaluation, of each corpus a share by its weight.

    Args:
        rows: which rows of every batch this process reads.

    Raises:
        ValueError: for a corpus that cannot be read or holds nothing.
        ConnectionError: when one cannot be reached.
    """
    sources = [(open_source(corpus.name), corpus.weight) for corpus in corpora]
    fraction = settings.hold_out if settings.eval_data is None else 0.0
    packed = not (settings.carry_memory or settings.in_order)
    ending = _ending(tokenizer) if packed else np.empty(0, dtype=np.uint8)

    def encode(document: Document, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        changed, marks = with_insertions(document, settings, generator)
        tokens = np.concatenate([encode_document(tokenizer, changed.data, changed.name), ending])
        return tokens, None if marks is None else np.pad(marks, (0, len(tokens) - len(marks)))

    train = StreamDataset(
        sources,
        encode,
        settings.sequence_length,
        settings.batch_size,
        settings.steps,
        rows=rows,
        packed=packed,
        seed=settings.seed,
        keep=lambda document: bool(document.data) and not is_held_out(document.name, fraction),
    )
    total = sum(weight for _, weight in sources)
    held_out: list[Document] = []
    for source, weight in sources if fraction else []:
        held_out += first_held_out(source, fraction, tokenizer, settings.eval_tokens * weight / total)
    if fraction and not held_out:
        raise ValueError(
            f"hold_out={fraction}: no document of data={settings.data!r} falls into it; hold out more, give "
            "eval_data, or set hold_out to 0 for no evaluation"
        )
    return train, held_out


def first_held_out(
    source: DocumentSource, fraction: float, tokenizer: PreTrainedTokenizerBase, num_tokens: float
) -> list[Document]:
    """The first held-out documents of a corpus, until they have so many tokens or the corpus ends."""
    found = []
    for shard in range(source.num_shards):
        for document in source.documents(shard, (0,)):
            if num_tokens <= 0:
                return found
            if document.data and is_held_out(document.name, fraction):
                found.append(document)
                num_tokens -= len(encode_document(tokenizer, document.data, document.name))
    return found


def _ending(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """What separates packed documents: the tokenizer's end of text, or an empty line where it has none."""
    if tokenizer.eos_token_id is not None:
        return np.array([tokenizer.eos_token_id], dtype=np.int32)
    return encode_document(tokenizer, b"\n\n", "an empty line")
