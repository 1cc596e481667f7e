"""From text to training examples: corpora, tokenizers, splits by whole documents, batches."""

from __future__ import annotations

from titans.data.batches import CarryDataset, WindowDataset
from titans.data.corpora import is_corpus, list_corpora, load_corpus
from titans.data.documents import Document
from titans.data.sources import DocumentSource, open_source, weighted_corpora
from titans.data.split import hold_out, in_turn
from titans.data.streamed import StreamDataset
from titans.stream.tokenizer import (
    byte_tokenizer,
    encode_document,
    is_byte_tokenizer,
    leading_tokens,
    load_tokenizer,
)

__all__ = [
    "CarryDataset",
    "Document",
    "DocumentSource",
    "StreamDataset",
    "WindowDataset",
    "byte_tokenizer",
    "encode_document",
    "hold_out",
    "in_turn",
    "is_byte_tokenizer",
    "is_corpus",
    "leading_tokens",
    "list_corpora",
    "load_corpus",
    "load_tokenizer",
    "open_source",
    "weighted_corpora",
]
