"""Inspect a memory: surprise, gates and gain in prediction, token by token, as arrays, page and picture."""

from titans.inspection.attention import SeenKeys, draw_seen_keys, seen_keys
from titans.inspection.grafted import GraftInspection, GraftReading, inspect_graft
from titans.inspection.measure import Inspection, inspect_text
from titans.inspection.page import write_page
from titans.inspection.picture import draw_graft_inspection, draw_inspection

__all__ = [
    "GraftInspection",
    "GraftReading",
    "Inspection",
    "SeenKeys",
    "draw_graft_inspection",
    "draw_inspection",
    "draw_seen_keys",
    "inspect_graft",
    "inspect_text",
    "seen_keys",
    "write_page",
]
