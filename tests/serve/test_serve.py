"""`titans serve` over a socket: OpenAI's own client and curl, with a `Session` as the oracle."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch.utils import _pytree as pytree

from titans.cli.conversation import Conversation
from titans.serve.answer import Answer
from titans.serve.choosing import Chooser
from titans.serve.engine import PIECE
from titans.serve.memories import Memories, owner_of
from titans.serve.settings import Settings
from titans.stream import Session
from titans.stream.turns import Turns

from .servers import Server, engines, running

KEY, OTHER = "sk-first", "sk-second"
BOOK = "All the world's a stage, and all the men and women merely players. " * 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = engines()
    folder = tmp_path_factory.mktemp("serve")
    with running(folder / "memories", models, keys=(KEY, OTHER), requests=70, body=1 << 20) as found:
        yield found
    for engine in models.values():
        engine.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as found:
        yield found


def session_of(server: Server, name: str) -> Session:
    return server.service.engines[name].session()


def conversation_of(server: Server, name: str) -> Conversation:
    session = session_of(server, name)
    return Conversation(session, Turns(server.service.engines[name].tokenizer))


def said(conversation: Conversation, message: str, most: int = 8) -> str:
    pieces: list[str] = []
    conversation.ask(message, pieces.append, lambda: False, max_new_tokens=most, do_sample=False)
    return "".join(pieces)


def new_memory(server: Server, model: str, key: str = KEY, **body: Any) -> str:
    status, found = server.call("POST", "/v1/memories", {"model": model, **body}, key)
    assert status == 200, found
    return str(found["id"])


def saved_session(server: Server, name: str, id: str, path: Path) -> Session:
    """The memory as a client downloads it."""
    status, content = server.call("GET", f"/v1/memories/{id}/file", key=KEY)
    assert status == 200
    path.write_bytes(content)
    engine = server.service.engines[name]
    return Session.load(path, engine.model, engine.tokenizer)


def assert_same(found: Session, expected: Session) -> None:
    assert found.num_tokens == expected.num_tokens and found.recent == expected.recent
    states, others = (pytree.tree_leaves(each.cache.states) for each in (found, expected))
    for mine, its in zip(states, others, strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-8)


def test_texts_of_many_clients_are_what_a_session_gives_each(server: Server, client: openai.OpenAI) -> None:
    prompts = [BOOK[: 5 + 13 * n] for n in range(4)]
    expected = []
    for prompt in prompts:
        session = session_of(server, "bytes")
        session.feed(prompt)
        expected.append(session.generate(max_new_tokens=8, do_sample=False))

    def ask(prompt: str) -> Any:
        return client.completions.create(model="bytes", prompt=prompt, max_tokens=8, temperature=0)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, prompts))
    assert [answer.choices[0].text for answer in found] == expected and len(set(expected)) > 2
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 8
        assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    # Several prompts at once, and streamed.
    both = client.completions.create(model="bytes", prompt=prompts[:2], max_tokens=8, temperature=0)
    assert [choice.text for choice in both.choices] == expected[:2]
    parts = list(
        client.completions.create(
            model="bytes", prompt=prompts[3], max_tokens=8, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected[3]
    assert parts[-1].usage.total_tokens == len(prompts[3]) + 8


def test_a_seed_gives_what_transformers_choose_with_it(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = dict(temperature=0.7, top_p=0.8)
    session = session_of(server, "bytes")
    session.feed("Hello")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = session.generate(max_new_tokens=9, do_sample=True, top_k=0, **options)
    ask = client.completions.create
    found = [
        ask(model="bytes", prompt="Hello", max_tokens=9, seed=seed, n=n, **options)
        for seed, n in ((7, 1), (6, 2), (8, 1))
    ]
    texts = [[choice.text for choice in answer.choices] for answer in found]
    assert texts[0] == [expected] and texts[1][1] == expected, "the second choice has the next seed"
    assert texts[2] != texts[0] and texts[1][0] != expected


def test_probabilities_are_the_models(server: Server, client: openai.OpenAI) -> None:
    engine = server.service.engines["bytes"]
    answer = client.completions.create(model="bytes", prompt="Hello", max_tokens=3, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    ids = torch.tensor([list(b"Hello" + answer.choices[0].text.encode())])
    with torch.no_grad():
        log_probs = engine.model(ids).logits[0].log_softmax(-1)[4:-1]
    expected = [float(log_probs[n, token]) for n, token in enumerate(ids[0, 5:].tolist())]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-5)
    assert "".join(found.tokens) == answer.choices[0].text and found.text_offset == [0, 1, 2]
    assert [max(each.values()) for each in found.top_logprobs] == pytest.approx(expected, abs=1e-5)
    messages: Any = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(
        model="chat", messages=messages, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == chat.usage.completion_tokens and len(entries[0].top_logprobs) == 3
    assert entries[0].logprob == pytest.approx(entries[0].top_logprobs[0].logprob)


def test_a_conversation_remembers_what_was_read_many_turns_ago(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    memory, conversation = new_memory(server, "chat"), conversation_of(server, "chat")
    status, found = server.call("POST", f"/v1/memories/{memory}/read", {"text": BOOK}, KEY)
    assert status == 200 and found["tokens"] == found["read"]["tokens"] == len(BOOK)
    conversation.session.feed(BOOK)
    assert found["surprise"] == pytest.approx(conversation.session.mean_surprise)

    def ask(message: str, stream: bool = False, **more: Any) -> str:
        messages: Any = [{"role": "user", "content": message}]
        answer: Any = client.chat.completions.create(
            model="chat", messages=messages, temperature=0, max_tokens=8, stream=stream,
            extra_body={"memory": memory, **more},
        )  # fmt: skip
        if not stream:
            assert answer.usage.prompt_tokens < 60, "the past is not sent again"
            return answer.choices[0].message.content
        return "".join(part.choices[0].delta.content or "" for part in answer)

    for turn in range(4):
        assert ask(f"Line {turn}?", stream=turn % 2 == 0) == said(conversation, f"Line {turn}?")
    # This one leaves no trace.
    before = server.call("GET", f"/v1/memories/{memory}", key=KEY)[1]
    assert ask("Secret?", remember=False) == said(conversation.fork(), "Secret?")
    assert server.call("GET", f"/v1/memories/{memory}", key=KEY)[1] == before
    expected = said(conversation, "And now?")
    assert ask("And now?") == expected
    assert_same(saved_session(server, "chat", memory, tmp_path / "memory"), conversation.session)
    # Without what was read the answers are others.
    forgetful = conversation_of(server, "chat")
    for turn in range(4):
        said(forgetful, f"Line {turn}?")
    assert said(forgetful, "And now?") != expected


def test_without_a_memory_the_whole_conversation_is_sent_and_gives_the_same(
    server: Server, client: openai.OpenAI
) -> None:
    for model in ("chat", "bytes"):
        memory, messages = new_memory(server, model), []
        for turn in range(2):
            messages.append({"role": "user", "content": f"Line {turn}?"})
            options: Any = dict(model=model, temperature=0, max_tokens=6)
            whole = client.chat.completions.create(messages=messages, **options)
            alone = client.chat.completions.create(
                messages=messages[-1:], **options, extra_body={"memory": memory}
            )
            assert whole.choices[0].message.content == alone.choices[0].message.content
            assert alone.memory == memory
            messages.append({"role": "assistant", "content": whole.choices[0].message.content})


def test_a_stop_text_ends_an_answer_and_is_not_remembered(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    memory, session = new_memory(server, "bytes"), session_of(server, "bytes")
    session.feed(BOOK[:50])
    whole = session.fork().generate(max_new_tokens=20, do_sample=False)
    stop = whole[9:12]
    cut = whole[: whole.index(stop)]
    options: Any = dict(model="bytes", prompt=BOOK[:50], max_tokens=20, temperature=0, stop=["@@", stop])
    parts = list(client.completions.create(**options, stream=True))
    assert (
        "".join(part.choices[0].text for part in parts) == cut
        and parts[-1].choices[0].finish_reason == "stop"
    )
    answer = client.completions.create(**options, extra_body={"memory": memory})
    assert answer.choices[0].text == cut
    session.feed(cut)
    assert_same(saved_session(server, "bytes", memory, tmp_path / "memory"), session)


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
    assert len(answer.choices[0].text) == 5 and engine.waiting == 1, "the reading goes on"
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


def wait_until(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come")


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
    again = Memories(Settings(folder, ram=1), engines)
    for id in (memory, fork, empty):
        before, now = (each.get(owner_of(KEY), id) for each in (server.service.memories, again))
        assert now.shown() == before.shown() and now.begun == before.begun == (id != empty)
        assert_same(again.state(now).session, server.service.memories.state(before).session)
    assert again.held_bytes == again.state(again.get(owner_of(KEY), fork)).session.state_bytes, "one is held"
    assert {path.name for path in folder.iterdir() if path.suffix not in (".json", ".memory")} == {
        ".lock", "mine.txt",
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


def test_numbers_of_the_server_name_no_user_and_no_text(
    server: Server, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    assert {model.id for model in client.models.list()} == {"bytes", "chat"}
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
