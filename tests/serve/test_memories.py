"""Memories over a socket: read into, moved as files, kept from other keys and over a crash."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pypdf
import pytest

from titans.serve.errors import ApiError
from titans.serve.memories import Memories, owner_of
from titans.serve.settings import Settings

from ..pdf import a_pdf
from .servers import (
    BOOK,
    KEY,
    OTHER,
    Server,
    assert_same,
    forked,
    new_memory,
    saved_session,
    session_of,
)


def test_curl_has_a_memory_read_files_and_forks_it(server: Server, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")

    def curl(path: str, *options: str) -> str:
        command = ["curl", "-sS", f"{server.url}{path}", "-H", f"Authorization: Bearer {KEY}", *options]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    memory = json.loads(curl("/v1/memories", "-X", "POST"))["id"]
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>no</title></head><body><h1>One &amp; two</h1><script>no()</script>"
        "<p>a\nb  c</p></body></html>"
    )
    read = json.loads(curl(f"/v1/memories/{memory}/read", "-F", f"file=@{page}"))
    assert read["tokens"] == len("One & two\na b c\n") and read["read"]["bytes"] == read["tokens"]
    text = tmp_path / "notes.md"
    text.write_text("Naïve 😀 " * 60)
    shown = curl(f"/v1/memories/{memory}/read?stream=true&detail=true", "-N", "-F", f"file=@{text}")
    events = [json.loads(line[6:]) for line in shown.splitlines() if line.startswith("data: {")]
    assert shown.rstrip().endswith("data: [DONE]") and events[-1]["read"]["tokens"] == len(text.read_bytes())
    assert len(events) > 3 and [e["bytes"] for e in events[:-1]] == sorted(e["bytes"] for e in events[:-1])
    session = session_of(server, "bytes")
    session.feed("One & two\na b c\n")
    expected = session.feed(text.read_bytes(), collect_surprise=True)
    found = [value for event in events[:-1] for value in event["surprises"]]
    assert found == pytest.approx(expected.surprises.mean(-1)[1:].tolist(), rel=1e-3)
    assert "".join(t for event in events[:-1] for t in event["texts"]) == text.read_text()[:-1]

    fork = json.loads(curl(f"/v1/memories/{memory}/fork", "-X", "POST"))
    assert fork["tokens"] == session.num_tokens and fork["id"] != memory
    curl(f"/v1/memories/{fork['id']}/read", "-H", "content-type: text/plain", "--data-binary", "more")
    listed = {m["id"]: m["tokens"] for m in json.loads(curl("/v1/memories"))["data"]}
    assert listed[fork["id"]] == session.num_tokens + 4 and listed[memory] == session.num_tokens
    assert json.loads(curl(f"/v1/memories/{fork['id']}", "-X", "DELETE"))["deleted"]
    assert "memory_not_found" in curl(f"/v1/memories/{fork['id']}")
    assert not list(server.service.settings.folder.glob(f"*{fork['id']}*"))


def test_a_memory_moves_as_a_file_and_a_damaged_one_is_refused(server: Server) -> None:
    one, other = new_memory(server, "bytes"), new_memory(server, "bytes")
    assert server.call("GET", f"/v1/memories/{one}/file", key=KEY)[0] == 409
    server.call("POST", f"/v1/memories/{one}/read", {"text": BOOK}, KEY)
    content = server.call("GET", f"/v1/memories/{one}/file", key=KEY)[1]
    status, found = server.call("PUT", f"/v1/memories/{other}/file", content, KEY)
    assert status == 200 and found["tokens"] == len(BOOK)
    for wrong in (b"", b"no memory", content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        status, error = server.call("PUT", f"/v1/memories/{other}/file", wrong, KEY)
        assert status == 400 and "/tmp" not in error["error"]["message"], error
    assert server.call("PUT", f"/v1/memories/{new_memory(server, 'chat')}/file", content, KEY)[0] == 400
    assert server.call("GET", f"/v1/memories/{other}", key=KEY)[1]["tokens"] == len(BOOK)


def test_another_key_sees_nothing_and_no_key_nothing_at_all(server: Server) -> None:
    memory = new_memory(server, "bytes", key=KEY)
    server.call("POST", f"/v1/memories/{memory}/read", {"text": "A secret."}, KEY)
    assert server.call("GET", "/v1/memories", key=OTHER)[1]["data"] == []
    none = server.call("GET", "/v1/memories/mem_" + "0" * 24, key=OTHER)
    hidden = server.call("GET", f"/v1/memories/{memory}", key=OTHER)
    assert none[0] == hidden[0] == 404
    assert hidden[1]["error"]["message"].replace(memory, "X") == none[1]["error"]["message"].replace(
        "mem_" + "0" * 24, "X"
    )
    body = {"model": "bytes", "prompt": "x", "memory": memory}
    for method, path, sent in (
        ("DELETE", f"/v1/memories/{memory}", None),
        ("POST", f"/v1/memories/{memory}/fork", None),
        ("GET", f"/v1/memories/{memory}/file", None),
        ("PUT", f"/v1/memories/{memory}/file", b"x"),
        ("POST", f"/v1/memories/{memory}/read", {"text": "x"}),
        ("POST", "/v1/memories", {"copy_of": memory}),
        ("POST", "/v1/completions", body),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "memory": memory}),
    ):
        assert server.call(method, path, sent, OTHER)[0] == 404, path
        for key in (None, "", "sk-firs", "sk-firstt", "sk-first\0"):
            # A header that no HTTP allows ends the connection, before a body may have been received.
            status, found = server.call(method, path, None if "\0" in (key or "") else sent, key)
            assert status in (400, 401) and (status == 400 or found["error"]["code"] == "invalid_api_key")
    assert server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]["tokens"] == 9
    names = [path.name for path in server.service.settings.folder.iterdir()]
    assert all(KEY not in name for name in names)
    record = server.service.settings.folder / f"{memory}.json"
    assert KEY not in record.read_text() and json.loads(record.read_text())["owner"] == owner_of(KEY)


def test_what_was_acknowledged_is_there_after_a_crash(server: Server, tmp_path: Path) -> None:
    """The folder as it stands at the acknowledgement, opened by another server, with what a crash leaves."""
    memory, engines = new_memory(server, "chat"), server.service.engines
    body = {"messages": [{"role": "user", "content": "Hello?"}], "memory": memory, "max_tokens": 5}
    assert server.call("POST", "/v1/chat/completions", body, KEY)[0] == 200
    fork = server.call("POST", f"/v1/memories/{memory}/fork", key=KEY)[1]["id"]
    empty = new_memory(server, "bytes")
    folder = tmp_path / "after"
    shutil.copytree(server.service.settings.folder, folder)
    (folder / f".{memory}.memory.1.part").write_bytes(b"half")
    (folder / f"mem_{'a' * 24}.memory").write_bytes(b"never acknowledged")
    (folder / "mine.txt").write_text("not the server's")
    without = Memories(Settings(folder), {})
    with pytest.raises(ApiError, match="of the model 'chat', which is not served"):
        without.get(owner_of(KEY), memory)
    with pytest.raises(ApiError, match="there is no memory"):
        without.get("another", memory)
    without.close()
    again = Memories(Settings(folder, ram=1), engines)
    for id in (memory, fork, empty):
        before, now = (each.get(owner_of(KEY), id) for each in (server.service.memories, again))
        assert now.shown() == before.shown() and now.begun == before.begun == (id != empty)
        assert_same(again.state(now).session, server.service.memories.state(before).session)
    assert again.held_bytes == again.state(again.get(owner_of(KEY), fork)).session.state_bytes, "one is held"
    assert {path.name for path in folder.iterdir() if path.suffix not in (".json", ".memory")} == {
        ".incoming", ".lock", "mine.txt",
    }  # fmt: skip
    assert not (folder / f"mem_{'a' * 24}.memory").exists()
    # A disk that is full leaves what was there.
    state, kept = again.state(again.get(owner_of(KEY), memory)), again.file(again.get(owner_of(KEY), memory))
    content = kept.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titans.hf.state_file.os.replace", _full)
        with pytest.raises(Exception, match="could not be written"):
            again.commit(again.get(owner_of(KEY), memory), state)
    assert kept.read_bytes() == content and not list(folder.glob(".*part"))
    again.close()


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_pdf_is_read_page_by_page_and_one_that_cannot_be_read_is_refused(
    server: Server, tmp_path: Path
) -> None:
    memory, session = new_memory(server, "bytes"), session_of(server, "bytes")
    session.feed("We measured it twice.\n\nIt was there.\n\n")
    path, written = f"/v1/memories/{memory}/read", pypdf.PdfWriter()
    written.append(io.BytesIO(a_pdf("We measured it twice.", "It was there.")))
    for page in written.pages:
        page.compress_content_streams()
    written.write(plain := io.BytesIO())
    written.encrypt("secret", algorithm="RC4-128")
    written.write(closed := io.BytesIO())
    status, found = server.call("POST", path, plain.getvalue(), KEY, content_type="application/pdf")
    assert status == 200 and found["tokens"] == found["read"]["bytes"] == session.num_tokens
    assert_same(saved_session(server, "bytes", memory, tmp_path / "memory"), session)
    for wrong, message in (
        (closed.getvalue(), "could not be read"), (a_pdf(""), "holds no text"), (b"%PDF-1.7 no", "could not"),
    ):  # fmt: skip
        # What it is called does not matter.
        status, error = server.call("POST", path, wrong, KEY, content_type="text/plain")
        assert status == 400 and error["error"]["code"] == "no_text" and message in error["error"]["message"]
    assert server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]["tokens"] == session.num_tokens
    assert not list((server.service.settings.folder / ".incoming").iterdir())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_server_leaves_what_was_acknowledged_and_no_text(server: Server, tmp_path: Path) -> None:
    process, other = forked(tmp_path)
    try:
        memory = other.call("POST", "/v1/memories")[1]["id"]
        assert other.call("POST", f"/v1/memories/{memory}/read", {"text": BOOK})[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", other.port, timeout=60)
        body = json.dumps({"text": BOOK * 1000, "stream": True})
        connection.request("POST", f"/v1/memories/{memory}/read", body, {"content-type": "application/json"})
        assert b"memory.read.progress" in connection.getresponse().readline()
    finally:
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    connection.close()
    assert list((tmp_path / ".incoming").iterdir()), "it was reading"
    again, session = Memories(Settings(tmp_path), server.service.engines), session_of(server, "bytes")
    session.feed(BOOK)
    found = again.get("", memory)
    assert found.shown()["tokens"] == len(BOOK)
    assert_same(again.state(found).session, session)
    assert not list((tmp_path / ".incoming").iterdir())
    again.close()


def test_a_full_disk_is_an_error_that_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = new_memory(server, "bytes")
    monkeypatch.setattr("titans.serve.memory_routes._receive_file", _full)
    for method, end in (("POST", "read"), ("PUT", "file")):
        status, error = server.call(
            method, f"/v1/memories/{memory}/{end}", b"x", KEY, content_type="text/plain"
        )
        assert status == 507 and error["error"]["code"] == "disk_full"
    assert server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]["tokens"] == 0
    assert not list((server.service.settings.folder / ".incoming").iterdir())
