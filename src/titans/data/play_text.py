"""From a play in Markdown to plain text."""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\([\[\].-])")
_HEADING = re.compile(r"^#+ *(.*)$", re.MULTILINE)
_SPEAKER = re.compile(r"^ *\*\*(.+?)\*\* *$", re.MULTILINE)
_DIRECTION = re.compile(r"(_+|\*)\s*\[?([^_*]+?)\]?\s*\1?[_*]", re.DOTALL)
_LEFTOVER_MARKS = re.compile(r"_|\*|\[\s*\]")
_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def play_text(markdown: str) -> str:
    """Strip the markup of one play: headings stay as lines, speakers as `NAME:`, directions as `[Exit]`."""
    text = markdown.replace("\r\n", "\n").replace("&amp;", "&").replace("& c", "&c")
    text = _ESCAPE.sub(r"\1", text)
    text = _HEADING.sub(r"\1", text)
    text = _SPEAKER.sub(r"\1:", text)
    paragraphs = (_DIRECTION.sub(r"[\2]", paragraph) for paragraph in text.split("\n\n"))
    text = _LEFTOVER_MARKS.sub("", "\n\n".join(paragraphs))
    text = _BLANK_LINES.sub("\n\n", _LINE_END.sub("", text))
    return text.strip() + "\n"
