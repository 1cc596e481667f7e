"""Models to compare with."""

from __future__ import annotations

from titans.baselines.ngram import InterpolatedNgram

__all__ = ["InterpolatedNgram"]
