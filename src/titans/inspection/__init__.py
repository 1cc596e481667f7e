"""See what was remembered: numbers token by token, a page to look at, a picture."""

from titans.inspection.measure import Inspection, inspect_text
from titans.inspection.page import write_page
from titans.inspection.picture import draw_inspection

__all__ = ["Inspection", "draw_inspection", "inspect_text", "write_page"]
