"""What the models are compared with."""

from __future__ import annotations

from titans.baselines.ngram import InterpolatedNgram

__all__ = ["InterpolatedNgram"]
