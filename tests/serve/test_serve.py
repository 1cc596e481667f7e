"""Answers of `titans serve` to OpenAI's own client, with a `Session` as the oracle."""

from __future__ import annotations

import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from .servers import (
    BOOK,
    KEY,
    Server,
    assert_same,
    conversation_of,
    new_memory,
    running,
    said,
    saved_session,
    session_of,
)

ROOT = Path(__file__).parents[2]


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


def test_after_a_hundred_turns_the_memory_is_that_of_the_whole_text_read_at_once(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    """What a client does that knows OpenAI's API alone: each request has the new message and a name."""
    memory: Any = client.post("/memories", cast_to=object, body={"model": "bytes"})
    client.post(f"/memories/{memory['id']}/read", cast_to=object, body={"text": BOOK})
    whole, counted = BOOK, len(BOOK)
    for turn in range(100):
        messages: Any = [{"role": "user", "content": f"Line {turn}?"}]
        answer = client.chat.completions.create(
            model="bytes", messages=messages, max_tokens=2, temperature=0.5, seed=turn,
            extra_body={"memory": memory["id"]},
        )  # fmt: skip
        whole += f"Line {turn}?\n{answer.choices[0].message.content}\n"
        assert answer.usage.prompt_tokens == len(f"Line {turn}?\n")
        # An answer without a template ends with its line.
        counted += answer.usage.total_tokens + 1
    session = session_of(server, "bytes")
    session.feed(whole)
    assert_same(saved_session(server, "bytes", memory["id"], tmp_path / "memory"), session)
    held: Any = client.get(f"/memories/{memory['id']}", cast_to=object)
    assert held["tokens"] == counted == len(whole)


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


def test_penalties_are_subtracted_for_tokens_of_the_answer_alone(
    server: Server, client: openai.OpenAI
) -> None:
    def expected(presence: float, frequency: float) -> str:
        ids = list(b"Hello")
        for _ in range(20):
            with torch.no_grad():
                scores = server.service.engines["bytes"].model(torch.tensor([ids])).logits[0, -1]
            for id in set(ids[5:]):
                scores[id] -= presence + frequency * ids[5:].count(id)
            ids.append(int(scores.argmax()))
        return bytes(ids[5:]).decode()

    pairs = [(0.0, 0.0), (2.0, 0.0), (0.0, -2.0), (-2.0, 1.5)]
    found = [
        client.completions.create(
            model="bytes", prompt="Hello", max_tokens=20, temperature=0, presence_penalty=presence,
            frequency_penalty=frequency,
        ).choices[0].text
        for presence, frequency in pairs
    ]  # fmt: skip
    assert found == [expected(*pair) for pair in pairs] and len(set(found)) == len(pairs)


def test_what_is_not_supported_is_refused_by_name_in_the_apis_form(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages: Any = [{"role": "user", "content": "Hello"}]
    for field, value in {
        "tools": [tool], "functions": [tool["function"]], "tool_choice": "required", "n": 9,
        "logit_bias": {"65": 1.0}, "presence_penalty": 2.1, "response_format": {"type": "json_object"},
        "messages": [{"role": "user", "content": [image]}], "modalities": ["audio"], "mesages": [],
    }.items():  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="chat", messages=messages, max_tokens=1, extra_body={field: value}
            )
        error: Any = caught.value.body
        assert error["param"].partition(".")[0] == field and error["type"] == "invalid_request_error"
        assert error["code"] == "invalid_body" and error["message"].startswith(f"{field}: "), error
    for field in ("echo", "suffix", "best_of"):
        with pytest.raises(openai.BadRequestError, match=f"{field}.* not supported; leave it out"):
            client.completions.create(model="bytes", prompt="x", max_tokens=1, extra_body={field: 3})
    with pytest.raises(openai.NotFoundError, match=r"there are /v1/models, /v1/models/\{name\}, .*/read"):
        client.responses.create(model="bytes", input="x")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt': this server has bytes, chat"):
        client.completions.create(model="gpt", prompt="x")
    # What says nothing is taken, as clients send it.
    nothing: Any = dict(tools=[], logit_bias={}, presence_penalty=0, n=1, response_format={"type": "text"})
    assert client.chat.completions.create(
        model="chat", messages=messages, max_tokens=1, extra_body=nothing
    ).choices


def test_a_causal_model_of_transformers_remembers_and_answers_many_at_once(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    memory, conversation = new_memory(server, "llama"), conversation_of(server, "llama")
    server.call("POST", f"/v1/memories/{memory}/read", {"text": BOOK}, KEY)
    conversation.session.feed(BOOK)

    def ask(message: str, **more: Any) -> str:
        messages: Any = [{"role": "user", "content": message}]
        answer = client.chat.completions.create(
            model="llama", messages=messages, temperature=0, max_tokens=8,
            extra_body={"memory": memory, **more},
        )  # fmt: skip
        return str(answer.choices[0].message.content)

    asked = [f"{'Long ' * n}{n}?" for n in range(5)]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda message: ask(message, remember=False), asked))
    assert found == [said(conversation.fork(), message) for message in asked] and len(set(found)) > 2
    for message in asked[:2]:
        assert ask(message) == said(conversation, message)
    assert_same(saved_session(server, "llama", memory, tmp_path / "memory"), conversation.session)


def test_the_clients_of_readme_and_guide_and_the_example_of_a_hundred_turns_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = ROOT / "examples" / "hundred_turns.py"
    with running(tmp_path / "memories", server.service.engines) as open_to_all:
        monkeypatch.setattr(sys, "argv", [example.name, f"{open_to_all.url}/v1", "2"])
        runpy.run_path(str(example), run_name="__main__")
        out = capsys.readouterr().out
        (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        for name, own in ({"http://127.0.0.1:8000": open_to_all.url, "titans-smollm2-135m": "bytes"}).items():
            code = code.replace(name, own)
        exec(code, {})
        assert capsys.readouterr().out.strip()
        # The guide's client, whose book is any, and then its chat.
        monkeypatch.chdir(tmp_path)
        Path("book.txt").write_text(BOOK)
        (client, chat) = re.findall(
            r"```python\n(.*?)```", (ROOT / "docs/guides/serve.md").read_text(), re.DOTALL
        )
        code = (client + chat).replace("http://127.0.0.1:8000", open_to_all.url)
        names: dict[str, Any] = {}
        exec(code.replace("titans-smollm2-135m", "chat").replace("body={}", 'body={"model": "chat"}'), names)
        held = names["client"].get(f"/memories/{names['memory']}", cast_to=object)
        assert held["tokens"] > 100, "both turns are in the memory"
    assert "recalled at once: 0 of 6" in out and "2 turns, " in out
