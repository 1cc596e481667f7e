"""Hostile clients: malformed requests end in 4xx, and whoever never reads, writes or ends holds up nobody."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from titans.serve.answer import Answer
from titans.serve.bodies import ChatBody, CompletionBody
from titans.stream.tokenizer import byte_tokenizer

from .servers import Server, running, wait_until


def benchmark() -> Any:
    """The command that sends ten thousand of them."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_server.py"
    spec = importlib.util.spec_from_file_location("fuzz_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hostile_requests_end_in_4xx(server: Server, tmp_path: Path) -> None:
    fuzz, models = benchmark(), server.service.engines
    with running(tmp_path / "memories", models, body=100_000, json=50_000, body_seconds=0.3) as small:
        memory = small.call("POST", "/v1/memories")[1]["id"]
        for status, request in (
            *fuzz.one_of_each(small.port, memory),
            *fuzz.attack(small.port, memory, 80, seed=0),
        ):
            assert 400 <= status < 500 or status == 200, (status, request)
        assert small.call("GET", "/health")[0] == 200
        assert small.service._active == 0 and all(not e.waiting + e.generating for e in models.values())


@pytest.fixture(scope="module")
def hasty(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nobody long."""
    folder = tmp_path_factory.mktemp("hasty")
    with running(folder / "memories", server.service.engines, body_seconds=0.4) as found:
        yield found


def read_request(server: Server, body: bytes, length: int | None = None, query: str = "") -> bytes:
    memory = server.call("POST", "/v1/memories")[1]["id"]
    head = (
        f"POST /v1/memories/{memory}/read?{query} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: text/plain\r\n"
        f"content-length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def idle(server: Server) -> bool:
    return server.service._active == 0 and not any(
        engine.waiting + engine.generating for engine in server.service.engines.values()
    )


def test_whoever_does_not_read_an_answer_loses_it_and_their_place(hasty: Server) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", hasty.port))
        client.sendall(read_request(hasty, b"Never read. " * 600, query="stream=true&detail=true"))
        wait_until(lambda: hasty.service._active == 1)
        wait_until(lambda: idle(hasty))
        received = b""
        while part := client.recv(65536):
            received += part
        assert b"memory.read.progress" in received and b"[DONE]" not in received
    assert all(memory["tokens"] == 0 for memory in hasty.call("GET", "/v1/memories")[1]["data"])


def test_a_body_that_comes_a_byte_at_a_time_is_refused_and_half_a_one_leaves_nothing(hasty: Server) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as client:
        client.sendall(read_request(hasty, b"", length=1000))
        client.settimeout(0.1)
        answer = b""
        for _ in range(100):
            with suppress(TimeoutError):
                answer = client.recv(4096)
                break
            client.sendall(b"x")
        assert b" 408 " in answer, answer
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as client:
        client.sendall(read_request(hasty, b"x" * 500, length=1000))
        wait_until(lambda: hasty.service._active == 1)
    wait_until(lambda: idle(hasty))
    assert not list((hasty.service.settings.folder / ".incoming").iterdir())


def test_a_file_that_is_parsed_for_ever_holds_up_nobody_and_ends_with_its_client(
    hasty: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, begun = tmp_path / "extract.py", tmp_path / "begun"
    program.write_text(f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(100)")
    monkeypatch.setattr("titans.serve.uploads._PROGRAM", program)
    with ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", hasty.port)))
            client.sendall(read_request(hasty, b"%PDF-1.4 for ever"))
        wait_until(lambda: begun.exists() and begun.read_text())
        memory = hasty.call("POST", "/v1/memories")[1]["id"]
        status, found = hasty.call("POST", f"/v1/memories/{memory}/read", b"Hi", content_type="text/plain")
        assert status == 200 and found["tokens"] == 2
    wait_until(lambda: idle(hasty))
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
    assert not list((hasty.service.settings.folder / ".incoming").iterdir())


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [{}] * 5000},
        {"prompt": [[0.5]] * 5000},
        {"prompt": "x", "stop": [1] * 5000},
        {"prompt": "x", **{str(number): 1 for number in range(5000)}},
        {"messages": [{}] * 5000},
        {"messages": [{"role": "user", "content": [{}] * 5000}]},
        {"messages": [{"role": "user", **{str(number): 1 for number in range(5000)}}]},
    ],
)
def test_one_error_of_many_is_enough(body: dict[str, Any]) -> None:
    """Millions of them would take minutes to list, and all clients would wait."""
    kind = ChatBody if "messages" in body else CompletionBody
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("stops", "shown", "kept"),
    [
        (["lo w"], ["h", "e", "", "l", "", "", ""], "hel"),
        (["xyz"], list("hello worl"), "hello worl"),
        (["ell", "l"], ["h", "", "e"], "he"),
        (["lll", "lo wx"], ["h", "e", "", "", "l", "", "", "lo wo", "r", "l"], "hello worl"),
        (["h"], [""], ""),
    ],
)
def test_no_part_of_a_stop_text_is_shown(stops: list[str], shown: list[str], kept: str) -> None:
    answer = Answer(byte_tokenizer(), (), stops=stops, most=10)
    found = []
    for token in b"hello world":
        found.append(answer.add(token))
        if answer.finish:
            break
    assert "".join(found) == answer.text == kept
    assert found == shown
    ids, rest = answer.kept() if answer.cut else (answer.ids, "")
    assert bytes(ids).decode() + rest == kept
