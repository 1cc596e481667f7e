"""A self-contained HTML page: the text coloured by what a memory found in it and gained in prediction."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from titans.data import is_byte_tokenizer
from titans.inspection.graft_page import graft_content
from titans.inspection.grafted import GraftInspection
from titans.inspection.measure import Inspection
from titans.inspection.memory_page import memory_content
from titans.inspection.parts import packed, token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_page(
    path: Path,
    found: Inspection | GraftInspection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    about: str,
) -> None:
    """Write the page of an inspection; it needs no network and no other file.

    Args:
        title: names the text. about: one line about the model and what it is compared with.
    """
    texts = token_texts(found.ids, tokenizer)
    graft = isinstance(found, GraftInspection)
    data = {
        "title": title,
        "about": about + ("; a token is a byte" if is_byte_tokenizer(tokenizer) else ""),
        "text": "".join(texts),
        # JavaScript counts in units of UTF-16.
        "lengths": packed(np.array([len(text.encode("utf-16-le")) // 2 for text in texts], np.uint8)),
        **(graft_content(found, texts) if graft else memory_content(found, texts)),
    }
    # No "<" of the text may open or close anything.
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = files("titans.inspection").joinpath("page.html").read_text(encoding="utf-8")
    path.write_text(template.replace("__DATA__", content), encoding="utf-8", errors="replace")
