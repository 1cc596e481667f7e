"""The page holds the whole text, whatever is in it, and draws the measured values."""

from __future__ import annotations

import base64
import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titans.cli import main

from ..checkpoints import save_byte_model

TEXT = "Naïve 😀 <!--<script> </script><script>alert(1)</script> <b>& “so” on.\n\n" * 40


class Scripts(html.parser.HTMLParser):
    """What a browser takes for scripts, and for tags."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def unpacked(values: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values), np.uint8)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = dict(
        variant="mac", num_hidden_layers=2, chunk_size=8, segment_length=16, initializer_range=0.3
    )
    return save_byte_model(tmp_path_factory.mktemp("checkpoint"), **sizes)


def test_the_page_is_whole_and_true(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["inspect", str(text), "--checkpoint", str(model_folder), "-o", str(page)]
    assert main([*arguments, "--another", "excerpt", "--json"]) == 0
    printed = capsys.readouterr()
    arrays = json.loads(printed.out)
    assert "tokens/s" in printed.err and str(page) in printed.err
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"

    parser = Scripts()
    parser.feed(page.read_text(encoding="utf-8"))
    assert len(parser.scripts) == 2 and "b" not in parser.tags, "the text became a part of the page"
    assert "<" not in parser.scripts[0] and "http" not in page.read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(parser.scripts[0])
    assert data["text"] == TEXT
    lengths = unpacked(data["lengths"])
    assert len(lengths) == len(TEXT.encode()) and lengths.sum() == len(TEXT.encode("utf-16-le")) // 2

    names = {channel["name"]: channel for channel in data["channels"]}
    surprise = np.array(arrays["surprise"]).mean(-1)
    drawn = unpacked(names["surprise"]["values"]) / 255
    low, high = names["surprise"]["low"], names["surprise"]["high"]
    np.testing.assert_allclose(
        low + drawn * (high - low), np.clip(surprise, low, high), atol=(high - low) / 250
    )
    for listed in data["lists"]:
        places = sorted(token for token, *_ in listed["items"])
        assert len(places) > 2 and np.diff(places).min() >= 512, "one passage is listed twice"
    known = np.array([own is not None for own in arrays["own"]])
    helped = names["gain over no memory"]
    gained = np.array([n - o for n, o in zip(arrays["none"], arrays["own"], strict=True) if o is not None])
    drawn = (unpacked(helped["values"])[known] - 128.0) / 127 * helped["high"]
    np.testing.assert_allclose(
        drawn, np.clip(gained, -helped["high"], helped["high"]), atol=helped["high"] / 120
    )
    for begin, excerpt, _ in data["lists"][0]["items"]:
        there = TEXT.encode()[begin : begin + 64].decode(errors="replace")
        assert excerpt.strip("\ufffd")[1:20] in " ".join(there.split()) or not excerpt.isascii()
    assert all(len(line["values"]) <= 400 for chart in data["charts"] for line in chart["lines"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--most", "1"], 2, "most=1: give a whole number of at least 2"),
        (["--another", "none"], 1, "neither a file nor a folder"),
        (["-o", "FOLDER"], 2, "is a folder"),
    ],
)
def test_a_wrong_call_is_explained(
    arguments: list[str],
    code: int,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = [str(tmp_path) if word == "FOLDER" else word for word in arguments]
    if "-o" not in options:
        options += ["-o", str(tmp_path / "page.html")]
    assert main(["inspect", str(model_folder), str(text), *options]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "page.html").exists()
