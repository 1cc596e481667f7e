"""What can be said of lm-evaluation-harness where it is not installed."""

from __future__ import annotations

import sys

import pytest

from titans.data import byte_tokenizer
from titans.evaluate.lm_eval import as_lm

from .models import small_model


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if it were missing, even where it is not.
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        as_lm(small_model(), byte_tokenizer())
