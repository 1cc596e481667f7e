"""A file in pieces is the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from titans.data import byte_tokenizer
from titans.stream.reading.pieces import read_pieces

TEXT = "to be or\nnot to be\n\nété tobe\n" + "aäa😀" * 9 + " to be\n"


def words() -> PreTrainedTokenizerFast:
    characters = {character: n for n, character in enumerate(sorted(set(TEXT)))}
    backend = Tokenizer(models.BPE(vocab=characters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("piece_bytes", [1, 2, 5, 11, 1000])
@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_pieces_join_to_the_file(kind: str, piece_bytes: int, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else words()
    path = tmp_path / "text"
    path.write_text(TEXT)
    pieces = list(read_pieces(path, tokenizer, piece_bytes))
    ids = np.concatenate([piece.ids for piece in pieces])
    expected = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids.tolist() == expected
    ends = np.cumsum([piece.num_bytes for piece in pieces])
    assert [piece.offset for piece in pieces] == [0, *ends[:-1]] and ends[-1] == len(TEXT.encode())


def test_what_is_not_utf_8_is_named_with_its_offset_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode() * 2 + b"\xff\n")
    for piece_bytes in (7, 1000):
        with pytest.raises(ValueError, match=f"0xff at offset {2 * len(TEXT.encode())};"):
            list(read_pieces(path, words(), piece_bytes))
    assert len(list(read_pieces(path, byte_tokenizer(), 1000))) == 1
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        list(read_pieces(path, byte_tokenizer()))
