"""Fast weights beside a language model's head that learn from its own cross-entropy while it reads."""

from titans.nn.adaptation.head import FunctionHead, Head, LinearHead, as_head
from titans.nn.adaptation.layer import Adaptation
from titans.nn.adaptation.state import AdaptationState

__all__ = ["Adaptation", "AdaptationState", "FunctionHead", "Head", "LinearHead", "as_head"]
