"""See what was remembered: numbers token by token, a page to look at, a picture."""

from titans.inspection.measure import Inspection, inspect_text

__all__ = ["Inspection", "inspect_text"]
