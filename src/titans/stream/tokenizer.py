"""From bytes to token ids: one byte per token, or any Hugging Face tokenizer."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTES = "bytes"
"""The name of the byte tokenizer wherever a tokenizer is asked for."""


@cache
def _byte_vocabulary() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level tokenizers → the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {characters[byte]: byte for byte in range(256)}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer whose 256 token ids are the byte values; nothing is special, nothing merged.

    It is saved and loaded by `AutoTokenizer` without custom code, and decodes every sequence of bytes (what
    is not UTF-8 becomes U+FFFD). There is no padding token, because each id is a byte that a text may hold.
    Set `tokenizer.pad_token_id = 0` to pad a batch (the attention mask marks the pads), but do not save
    it so: loading would make byte 0 special.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token ids are byte values, so that any file can be read without decoding it."""
    return len(tokenizer) == 256 and tokenizer.get_vocab() == _byte_vocabulary()


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The byte tokenizer for `"bytes"`, otherwise what `AutoTokenizer` finds under the name or folder.

    Raises ValueError when there is no such tokenizer.
    """
    if str(name_or_path) == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        return cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False),
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"tokenizer={str(name_or_path)!r} could not be loaded ({reason}); give {BYTES!r}, a folder with "
            "a saved tokenizer or the name of one that can be downloaded"
        ) from error


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens that the tokenizer puts before a text, such as Llama's beginning of sequence.

    None for most tokenizers. A model that was trained with them predicts worse where they are missing.
    """
    text, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for start in range(len(whole)):
        if whole[start : start + len(text)] == text:
            return list(whole[:start])
    return []


def encode_document(tokenizer: PreTrainedTokenizerBase, data: bytes, name: str) -> np.ndarray:
    """Token ids of one document, shape (tokens,): uint8 with the byte tokenizer, int32 with any other.

    In byte mode bytes are the token ids. Any other tokenizer reads text: ValueError names the document
    and the offset of the first byte that is not UTF-8. No special tokens are added.
    """
    if is_byte_tokenizer(tokenizer):
        return np.frombuffer(data, dtype=np.uint8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it "
            f"to UTF-8 or use the {BYTES!r} tokenizer, which reads any file"
        ) from None
    return np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int32)
