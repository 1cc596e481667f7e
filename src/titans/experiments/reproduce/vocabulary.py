"""A vocabulary of byte-level BPE, trained on the training documents of a corpus."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from titans.data import hold_out, load_corpus
from titans.train.settings import TrainSettings


def bpe_tokenizer(corpus: str, size: int, folder: Path) -> Path:
    """The folder of a tokenizer of `size` tokens; its name has a hash of what it was trained on.

    Trained by the library tokenizers on the documents that `titans train` does not hold out, once.

    Args:
        folder: where it is kept.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    documents, _ = hold_out(load_corpus(corpus), TrainSettings(corpus).hold_out)
    digest = hashlib.sha256(str(size).encode())
    for document in documents:
        digest.update(document.data)
    kept = folder / f"bpe-{size}-{digest.hexdigest()[:12]}"
    if kept.is_dir():
        return kept
    tokenizer = ByteLevelBPETokenizer()
    texts = (document.data.decode("utf-8", "replace") for document in documents)
    tokenizer.train_from_iterator(texts, vocab_size=size, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".bpe.") as made:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(made)
        os.rename(made, kept)
        # The context manager removes what bears this name.
        os.mkdir(made)
    return kept
