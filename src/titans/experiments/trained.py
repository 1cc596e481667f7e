"""What experiments with trained models share: the models, and the texts they read."""

from __future__ import annotations

from typing import Any

from torch import nn

from titans import zoo
from titans.data import load_corpus
from titans.experiments.runner import Request


def chosen_models(request: Request) -> dict[str, str]:
    """Label → name or folder: those asked for, or all in the zoo."""
    return dict(request.models) if request.models else {name: name for name in zoo.names()}


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
