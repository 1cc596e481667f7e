"""Many clients at once: who waits for whom, what is refused, and what is noted of it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from titans.serve.answer import Answer
from titans.serve.choosing import Chooser
from titans.serve.engine import PIECE, Engine
from titans.serve.errors import ApiError
from titans.serve.memories import Memories
from titans.stream.session_state import SessionState
from titans.stream.tokenizer import byte_tokenizer

from .servers import (
    KEY,
    Server,
    assert_same,
    byte_model,
    new_memory,
    running,
    wait_until,
)


def test_a_long_reading_holds_up_nobody_and_ends_when_its_reader_hangs_up(
    server: Server, client: openai.OpenAI
) -> None:
    memory, engine = new_memory(server, "bytes"), server.service.engines["bytes"]
    import http.client

    reader = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    body = json.dumps({"text": "All the world's a stage. " * 40_000, "stream": True})
    reader.request("POST", f"/v1/memories/{memory}/read", body, headers)
    response = reader.getresponse()
    first = response.readline()
    assert (
        first.startswith(b"data: ") and not server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]["tokens"]
    )
    answer = client.completions.create(model="bytes", prompt="Hello", max_tokens=5, temperature=0)
    assert len(answer.choices[0].text) == 5
    assert not server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]["tokens"], "the reading goes on"
    wait_until(lambda: engine.waiting == 1)
    response.close()
    reader.close()
    # A stream that nobody reads any more ends, too.
    with client.completions.create(model="bytes", prompt="Hello", max_tokens=16_000, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: engine.waiting == engine.generating == 0)
    assert server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]["tokens"] == 0, "it has not happened"


def test_a_token_waits_for_one_piece_of_a_text_and_no_more(server: Server) -> None:
    engine, order = server.service.engines["bytes"], list[str]()
    reading, generating = engine.session(), engine.session()
    generating.feed("Hello")
    answer = Answer(engine.tokenizer, generating.recent, most=6)

    async def both() -> None:
        await asyncio.gather(
            engine.read(reading, torch.zeros(8 * PIECE, dtype=torch.int64), lambda _: order.append("piece")),
            engine.generate(generating, Chooser(0), answer, lambda *_: order.append("token")),
        )

    asyncio.run(both())
    assert order.count("piece") == 8 and order.count("token") == 6 and reading.num_tokens == 8 * PIECE
    begin = order.index("token")
    assert order[begin:][:11] == ["token", "piece"] * 5 + ["token"], order


def test_limits_are_errors_of_their_own(server: Server, tmp_path: Path) -> None:
    limits: dict[str, Any] = dict(requests=1, memories=2, request_seconds=0.7, body_seconds=0.3, json=5_000)
    with running(tmp_path / "m", server.service.engines, **limits, memory_bytes=100_000) as small:
        endless = {"model": "bytes", "prompt": "x", "max_tokens": 16_000}
        answers: list[Any] = []
        busy = threading.Thread(target=lambda: answers.append(small.call("POST", "/v1/completions", endless)))
        busy.start()
        wait_until(lambda: small.service._active == 1)
        status, found = small.call("POST", "/v1/completions", endless)
        assert status == 429 and found["error"]["code"] == "too_busy"
        busy.join()
        assert answers[0][0] == 408 and answers[0][1]["error"]["code"] == "timeout"
        assert small.call("POST", "/v1/completions", {"prompt": "x" * 6_000})[0] == 413
        pieces = iter([b'{"prompt": "', b"x" * 6_000, b'"}'])
        assert small.call("POST", "/v1/completions", pieces, content_type="application/json")[0] == 413
        memory = small.call("POST", "/v1/memories")[1]["id"]
        status, found = small.call("POST", f"/v1/memories/{memory}/read", {"text": "x" * 20})
        assert status == 200
        assert small.call("POST", "/v1/memories", {"copy_of": memory})[0] == 200
        assert small.call("POST", f"/v1/memories/{memory}/fork")[1]["error"]["code"] == "too_many_memories"
        object.__setattr__(small.service.settings, "memory_bytes", 2 * found["bytes"] - 1)
        status, error = small.call("POST", f"/v1/memories/{memory}/read", {"text": "x"})
        assert status == 403 and error["error"]["code"] == "memory_quota_exceeded"
        assert small.call("GET", f"/v1/memories/{memory}")[1]["tokens"] == 20
        # A page of another origin, and one whose name was turned to this machine.
        assert small.call("GET", "/v1/memories", origin="http://evil.example")[0] == 403
        assert small.call("GET", "/v1/memories", host="evil.example")[0] == 403
        assert small.call("GET", "/v1/memories", origin=small.url)[0] == 200
        with pytest.raises(ValueError, match="used by another server"):
            Memories(small.service.settings, {})


def test_numbers_of_the_server_name_no_user_and_no_text(
    server: Server, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    assert {model.id for model in client.models.list()} == {"bytes", "chat", "llama"}
    assert client.models.retrieve("chat").owned_by == "titans"
    memory = new_memory(server, "bytes")
    with caplog.at_level("INFO", "titans.serve"):
        server.call("POST", f"/v1/memories/{memory}/read", {"text": "Rosebud"}, KEY)
        server.call("GET", "/v1/Rosebud", key=KEY)
        # The line of a request may come after its answer.
        wait_until(lambda: '"other"' in caplog.text)
    lines = {line["route"]: line for line in (json.loads(record.getMessage()) for record in caplog.records)}
    assert lines["/v1/memories/{id}/read"]["read_tokens"] == 7 and lines["other"]["status"] == 404
    status, text = server.call("GET", "/metrics")
    for shown in (caplog.text, text.decode()):
        assert "Rosebud" not in shown and memory not in shown and KEY not in shown
    assert status == 200 and 'titans_tokens_read_total{model="bytes"}' in text.decode()
    assert server.call("GET", "/health") == (200, {"status": "ok"})
    status, page = server.call("GET", "/")
    assert status == 200 and b"http" not in page.replace(b"http-equiv", b"") and b"<script>" in page


def test_nan_in_one_text_is_no_business_of_the_others(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, after = server.service.engines["bytes"], SessionState.after
    bad, others = engine.session(), [engine.session() for _ in range(2)]

    def after_all_but_7(self: SessionState, piece: torch.Tensor, *rest: Any) -> Any:
        if 7 in piece:
            raise FloatingPointError("the model answers NaN")
        return after(self, piece, *rest)

    async def together() -> list[Any]:
        # The thread of the engine waits until all three are there, and takes them in one call.
        with engine._changed:
            texts = [(others[0], b"Hello"), (bad, b"a\7b"), (others[1], b"world")]
            work = [engine.read(each, torch.tensor(list(text))) for each, text in texts]
            tasks = [asyncio.ensure_future(each) for each in work]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(SessionState, "after", after_all_but_7)
        found = asyncio.run(together())
    assert [type(each) for each in found] == [type(None), ApiError, type(None)] and found[1].status == 422
    assert bad.num_tokens == 0
    for each, text in zip(others, ("Hello", "world"), strict=True):
        alone = engine.session()
        alone.feed(text)
        assert_same(each, alone)
    model = byte_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    engine = Engine("broken", model, byte_tokenizer())
    # An answer that meets it is an error as well, and the memory stays as it was.
    with running(tmp_path / "m", {"broken": engine}) as small:
        memory = small.call("POST", "/v1/memories")[1]["id"]
        body = {"prompt": [65, 7], "memory": memory, "max_tokens": 3, "temperature": 0}
        for stream in (False, True):
            status, answer = small.call("POST", "/v1/completions", {**body, "stream": stream})
            shown = answer.decode() if stream else json.dumps(answer)
            assert status == (200 if stream else 422) and "model_failed" in shown, shown
        assert small.call("GET", f"/v1/memories/{memory}")[1]["tokens"] == 0
        # Others that generate in the same call go on to their end.
        starts = [engine.session() for _ in range(3)]
        for start, text in zip(starts, (b"Hello", b"a\7", b"world"), strict=True):
            start.feed(torch.tensor(list(text)))
        forks = [start.fork() for start in starts]
        answers = [Answer(byte_tokenizer(), start.recent, most=6) for start in starts]

        async def answer() -> list[Any]:
            with engine._changed:
                pairs = zip(forks, answers, strict=True)
                tasks = [asyncio.ensure_future(engine.generate(f, Chooser(0.0), a)) for f, a in pairs]
                await asyncio.sleep(0)
            return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(answer())
        assert [type(each) for each in found] == [type(None), ApiError, type(None)]
        for row in (0, 2):
            expected = starts[row].generate(max_new_tokens=6, do_sample=False)
            assert answers[row].text == expected and forks[row].num_tokens == 11
    engine.close()
