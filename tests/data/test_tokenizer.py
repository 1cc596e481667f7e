from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from titans.data import byte_tokenizer, encode_document, is_byte_tokenizer, load_tokenizer

TEXT = "Héllo  Ā\n\x00\tworld 😀 , isn't it\r\n"


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "to": 1, "be": 2, "été": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<unk>")


def test_ids_are_bytes_and_survive_saving(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path), load_tokenizer("bytes")):
        assert is_byte_tokenizer(tokenizer)
        assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
        assert tokenizer.decode(list(TEXT.encode())) == TEXT
        assert tokenizer.all_special_ids == []


def test_every_byte_sequence_decodes() -> None:
    data = np.random.default_rng(0).integers(0, 256, (50, 64), dtype=np.uint8)
    tokenizer = byte_tokenizer()
    for row in data:
        assert tokenizer.decode(row.tolist()) == row.tobytes().decode("utf-8", errors="replace")


def test_padding_with_byte_zero_changes_no_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id = 0
    batch = tokenizer(["Ā\x00", "abcd"], padding=True)
    assert batch["input_ids"] == [[0xC4, 0x80, 0, 0], list(b"abcd")]
    assert batch["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_bytes_are_encoded_as_they_are() -> None:
    data = bytes(range(256))
    tokens = encode_document(byte_tokenizer(), data, "all.bin")
    assert tokens.dtype == np.uint8 and tokens.tobytes() == data


def test_other_tokenizers_read_utf8_and_name_the_first_bad_byte(
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert not is_byte_tokenizer(word_tokenizer)
    tokens = encode_document(word_tokenizer, "to be été".encode(), "good.txt")
    assert tokens.dtype == np.int32 and tokens.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"bad\.txt is not valid UTF-8: byte 0xe9 at offset 6; .*'bytes'"):
        encode_document(word_tokenizer, b"to be \xe9t\xe9", "bad.txt")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer='.*nothing' could not be loaded"):
        load_tokenizer(tmp_path / "nothing")
