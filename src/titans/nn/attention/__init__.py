"""Attention: full, over a window, and over the segments of memory as context."""
