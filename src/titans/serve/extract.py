"""Takes the text out of a PDF or HTML file: a program of its own, because a file may take for ever.

    python extract.py pdf|html SOURCE TARGET SECONDS BYTES

It imports nothing of this package, has so many seconds and so many bytes of memory and of text, and ends
with 1 and a line on stderr for a file that cannot be read.
"""

from __future__ import annotations

import html.parser
import logging
import os
import resource
import sys
from pathlib import Path
from typing import TextIO

_HIDDEN = {"script", "style", "template", "noscript", "svg", "math", "head"}
_BREAKS = {
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figcaption", "figure",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p",
    "pre", "section", "table", "td", "th", "tr", "ul",
}  # fmt: skip


class _Page(html.parser.HTMLParser):
    """The text of a page: blocks on lines of their own, blanks as a browser shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            # Whatever was left open before it.
            self.hidden = 0
        elif tag in _HIDDEN:
            self.hidden += 1
        elif tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self.hidden = max(self.hidden - 1, 0)
        elif tag in _BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data.replace("\n", " "))

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.parts).split("\n"))
        return "\n".join(line for line in lines if line) + "\n"


def _html(source: Path, target: TextIO) -> None:
    page = _Page()
    page.feed(source.read_text("utf-8"))
    page.close()
    target.write(page.text())


def _pdf(source: Path, target: TextIO) -> None:
    from pypdf import PdfReader

    for page in PdfReader(source).pages:
        target.write(page.extract_text().strip() + "\n\n")


def _main(kind: str, source: str, target: str, seconds: str, size: str) -> int:
    memory = 4 * int(size) + (1 << 30)
    limits = (
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, int(size)),
    )
    for name, limit in limits:
        resource.setrlimit(name, (limit, limit))
    # Answers come first.
    os.nice(10)
    # A file may be the cause of any number of warnings.
    logging.disable()
    try:
        with open(target, "w+", encoding="utf-8", errors="replace") as text:
            (_pdf if kind == "pdf" else _html)(Path(source), text)
            text.seek(0)
            if not any(line.strip() for line in text):
                print("it holds no text", file=sys.stderr)
                return 1
    except UnicodeDecodeError as error:
        print(f"it is not valid UTF-8 at byte {error.start}", file=sys.stderr)
        return 1
    except MemoryError:
        print("it needs too much memory", file=sys.stderr)
        return 1
    except Exception as error:  # the parsers raise whatever their parts raise
        print((str(error).strip().splitlines() or [type(error).__name__])[0][:300], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
