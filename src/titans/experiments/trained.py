"""What experiments with trained models share: the models, and the texts they read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from titans import zoo
from titans.data import load_corpus
from titans.experiments.runner import Request
from titans.zoo.by_name import folder_in_library


def chosen_models(request: Request) -> dict[str, str]:
    """Label → name or folder: those asked for, or all in the zoo."""
    return dict(request.models) if request.models else {name: name for name in zoo.names()}


def graft_folder(place: str) -> Path:
    """Of a trained graft, by its name in the library or its folder."""
    return folder_in_library(place) or Path(place)


def hash_of_graft(place: str) -> str:
    """Of a trained graft's weights and settings, so that no figure stands for others."""
    folder = graft_folder(place)
    files = (folder / file for file in ("model.safetensors", "config.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def text_of(corpus: str) -> bytes:
    """All of a corpus that comes with the library."""
    return b"\n".join(document.data for document in load_corpus(corpus))


def haystack() -> str:
    """The Bible, which no model in the zoo was trained on."""
    return "\n".join(document.data.decode("utf-8", "replace") for document in load_corpus("bible"))


def load(place: str, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer, by name or folder."""
    model, tokenizer = zoo.load(place)
    nn.Module.to(model, device)
    return model, tokenizer
