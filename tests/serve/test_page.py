"""The page in headless Chromium: a file is read and coloured, a question asked, all with the keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from .browser import PROGRAM, Browser
from .servers import engines, running


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_a_file_is_read_and_a_question_asked_with_the_keyboard_alone(tmp_path: Path) -> None:
    models, book = engines(), tmp_path / "book.txt"
    book.write_text("All the <b>world's</b> a stage & all that. " * 30)
    with running(tmp_path / "memories", models) as server, Browser(server.url) as page:
        page.wait_for("document.querySelectorAll('#model option').length == 3")
        page.choose_file("#file", book)
        page.wait_for("document.querySelector('#reading-state').textContent.includes('are read')")
        text = page.value("document.querySelector('#text').textContent")
        assert text == book.read_text()[: len(text)] and len(text) >= len(book.read_text()) - 1
        assert page.value("document.querySelectorAll('#text span[title]').length") > 5
        assert page.value("document.querySelectorAll('#text b').length") == 0, "a text is no part of the page"
        page.wait_for("!document.querySelector('#send').disabled")

        # From the top to the message by Tab, and every stop of the way can be seen.
        stops = []
        page.value("document.activeElement.blur()")
        while (
            stop := page.value("document.activeElement.id || document.activeElement.tagName")
        ) != "message":
            stops.append(stop)
            assert len(stops) < 30, stops
            page.press("Tab", 9)
        assert {"model", "new", "fork", "download", "delete", "file"} <= set(stops), stops
        page.type("What is a stage?")
        page.press("Enter", 13, "\r")
        page.wait_for(
            "document.querySelector('.turn.assistant')?.textContent "
            "&& !document.querySelector('#send').disabled"
        )
        (memory,) = server.call("GET", "/v1/memories")[1]["data"]
        assert memory["tokens"] > len(book.read_text()) + len("What is a stage?")
        assert f"{memory['tokens']:,} tokens" in page.value("document.querySelector('#memories').textContent")
        page.value("document.querySelector('#fork').focus()")
        page.press("Enter", 13, "\r")
        page.wait_for("document.querySelectorAll('#memories li').length == 2")
        wide = page.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "it is wider than a phone"
        assert not page.problems, page.problems
    for engine in models.values():
        engine.close()
