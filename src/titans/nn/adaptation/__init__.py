"""Fast weights at a language model's head, updated during reading by the model's own cross-entropy."""

from titans.nn.adaptation.head import FunctionHead, Head, LinearHead, as_head
from titans.nn.adaptation.layer import Adaptation
from titans.nn.adaptation.state import AdaptationState

__all__ = ["Adaptation", "AdaptationState", "FunctionHead", "Head", "LinearHead", "as_head"]
