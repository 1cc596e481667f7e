"""The page in headless Chromium, at a phone's width and with the keyboard: files are dropped, read and
coloured, questions asked, memories forked, downloaded, uploaded and deleted."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from titans.stream import Session

from .browser import PROGRAM, Browser
from .servers import Server, assert_same, running, wait_until

LINE = "All the <b>world's</b> a stage & all that. "


def press(page: Browser, id: str) -> None:
    """A button, with the keyboard, as soon as it may be pressed."""
    page.wait_for(f"!document.querySelector('#{id}').disabled")
    page.value(f"document.querySelector('#{id}').focus()")
    page.press("Enter", 13, "\r")


def ask(page: Browser, text: str) -> None:
    page.value("document.querySelector('#message').focus()")
    page.type(text)
    page.press("Enter", 13, "\r")
    page.wait_for(
        f"[...document.querySelectorAll('.turn.user')].at(-1)?.textContent == {text!r} "
        "&& document.querySelector('.turn.assistant:last-child')?.textContent "
        "&& !document.querySelector('#send').disabled"
    )


def wait_for_reading(page: Browser) -> str:
    page.wait_for(
        "document.querySelector('#reading-state').textContent.includes('are read') "
        "&& !document.querySelector('#send').disabled"
    )
    return str(page.value("document.querySelector('#text').textContent"))


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_everything_the_page_does_with_the_keyboard_at_a_phones_width(server: Server, tmp_path: Path) -> None:
    book, paper = tmp_path / "book.txt", tmp_path / "paper.pdf"
    book.write_text(LINE * 30)

    def memories() -> dict[str, Any]:
        return {memory["id"]: memory for memory in small.call("GET", "/v1/memories")[1]["data"]}

    with (
        running(tmp_path / "memories", server.service.engines) as small,
        Browser("data:text/html,<h1>A paper</h1><p>We measured it twice.") as page,
    ):
        page.wait_for("!!document.querySelector('h1')")
        paper.write_bytes(base64.b64decode(page.call("Page.printToPDF")["data"]))
        page.call("Page.navigate", url=small.url)
        page.wait_for("document.querySelectorAll('#model option').length == 3")
        page.drop_file("#drop", book)
        text = wait_for_reading(page)
        assert text == book.read_text()[: len(text)] and len(text) >= len(book.read_text()) - 1
        assert page.value("document.querySelectorAll('#text span[title]').length") > 5
        assert page.value("document.querySelectorAll('#text b').length") == 0, "a text is no part of the page"
        page.choose_file("#file", paper)
        assert "We measured it twice" in wait_for_reading(page)

        # From the top to the message by Tab, and every stop of the way can be seen.
        stops = []
        page.value("document.activeElement.blur()")
        while (
            stop := page.value("document.activeElement.id || document.activeElement.tagName")
        ) != "message":
            stops.append(stop)
            assert len(stops) < 30, stops
            page.press("Tab", 9)
        assert {"model", "new", "fork", "download", "delete", "file", "upload"} <= set(stops), stops
        (first,), before = memories(), next(iter(memories().values()))["tokens"]
        ask(page, "What is a stage?")
        after = memories()[first]["tokens"]
        assert after > before + len("What is a stage?")
        assert f"{after:,} tokens" in page.value("document.querySelector('#memories').textContent")
        page.value("document.querySelector('#remember').focus()")
        page.press(" ", 32, " ")
        ask(page, "And who plays?")
        assert memories()[first]["tokens"] == after, "it leaves no trace"

        press(page, "fork")
        page.wait_for("document.querySelectorAll('#memories li').length == 2")
        (fork,) = memories().keys() - {first}
        assert memories()[fork]["tokens"] == after
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "loads"))
        press(page, "download")
        file = tmp_path / "loads" / f"{fork}.memory"
        wait_until(file.exists)
        engine, kept = small.service.engines["bytes"], small.service.memories
        loaded = Session.load(file, engine.model, engine.tokenizer)
        assert_same(loaded, kept.state(kept.get("", first)).session)
        page.choose_file("#upload", file)
        page.wait_for("document.querySelectorAll('#memories li').length == 3")
        assert [memory["tokens"] for memory in memories().values()] == [after] * 3
        page.value("window.confirm = () => true")
        press(page, "delete")
        page.wait_for("document.querySelectorAll('#memories li').length == 2")
        assert {first, fork} == memories().keys(), "the chosen one was the upload"
        for width in (390, 320):
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=700,
                deviceScaleFactor=1,
                mobile=True,
            )
            wide = page.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"it is wider than {width} pixels"
        assert not page.problems, page.problems
