"""A conversation in a terminal and through a pipe: what the model reads, and what every command does."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import titans
from titans import Session
from titans.cli import main
from titans.cli.conversation import Conversation
from titans.data import byte_tokenizer
from titans.stream.turns import Turns

from ..models import small_causal_lm
from . import processes

END = 257
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|s|>system\nBe brief.<|e|>\n{% endif %}"
    "<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
SYSTEM = "<|s|>system\nBe brief.<|e|>\n"


def chat_tokenizer(template: str | None = TEMPLATE, bos: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>"]})
    if bos:
        tokenizer.bos_token = bos
    tokenizer.chat_template = template
    return tokenizer


def chat_model(end_is_likely: float = 1.0, **changes: Any) -> Any:
    model = small_causal_lm("llama", vocab_size=258, **changes)
    with torch.no_grad():
        # Letters alone, and the end now and then.
        model.lm_head.weight[:97] = model.lm_head.weight[123:] = 0
        model.lm_head.weight[END] = end_is_likely * torch.randn(
            32, generator=torch.Generator().manual_seed(1)
        )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    chat_model().save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


def said(conversation: Conversation, message: str, **options: Any) -> str:
    pieces: list[str] = []
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    conversation.ask(message, pieces.append, lambda: False, **options)
    return "".join(pieces)


@pytest.mark.parametrize("graft", [False, True])
@pytest.mark.parametrize("likely", [0.0, 1.0])
def test_the_model_reads_what_its_template_writes(likely: float, graft: bool) -> None:
    model, tokenizer = chat_model(likely), chat_tokenizer()
    if graft:
        model = titans.graft(model, window=64, adaptation=False)
    conversation = Conversation(Session(model, tokenizer), Turns(tokenizer))
    answers = [said(conversation, text) for text in ("One?", "Two?")]
    text = SYSTEM
    for question, answer in zip(("One?", "Two?"), answers, strict=True):
        text += f"<|s|>user\n{question}<|e|>\n<|s|>assistant\n"
        alone = Session(model, tokenizer)
        alone.feed(text)
        whole = alone.generate(max_new_tokens=8, do_sample=False, eos_token_id=END)
        assert whole == answer and "<" not in answer
        text += f"{answer}<|e|>\n"
    assert (len(answers[0]) < 8) == bool(likely), "the case with an end that is written, and that without"
    assert conversation.session.num_tokens == len(tokenizer.encode(text))
    again = Session(model, tokenizer)
    again.feed(text)
    options = dict(max_new_tokens=8, do_sample=False)
    assert conversation.session.generate(**options) == again.generate(**options)


def test_a_text_that_was_read_comes_before_the_system_prompt(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("<s>" + TEMPLATE, bos="<s>")
    turns = Turns(tokenizer)
    question = "<|s|>user\nOne?<|e|>\n<|s|>assistant\n"
    assert turns.first("One?", begins_text=True) == "<s>" + SYSTEM + question
    assert turns.first("One?", begins_text=False) == SYSTEM + question
    assert turns.later("One?") == question and turns.closing == "<|e|>\n" and turns.end_tokens == [END]
    # A template whose every message begins with the token keeps it.
    assert Turns(chat_tokenizer(bos="<|s|>")).first("One?", begins_text=False) == SYSTEM + question
    plain = Turns(chat_tokenizer(None))
    assert plain.first("One?", True) == plain.later("One?") == "One?\n" and not plain.end_tokens
    assert [plain.later(text) for text in ("One is", "Is 1", "It is: ", "It is:")] == [
        "One is", "Is 1", "It is: ", "It is:\n",
    ]  # fmt: skip
    said = [{"role": "user", "content": "One is"}, {"role": "assistant", "content": " 2"}]
    assert plain.following([*said, said[0]]) == "One is\n 2\nOne is"
    with pytest.raises(ValueError, match=r"chat template cannot be used.*--plain"):
        Turns(chat_tokenizer("{{ raise_exception('no roles') }}"))
    with pytest.raises(ValueError, match="leaves out answers"):
        Turns(chat_tokenizer("nothing"))


def test_what_fails_has_not_happened_and_a_stopped_answer_stays() -> None:
    model, tokenizer = chat_model(0.0, max_position_embeddings=200), chat_tokenizer()
    conversation = Conversation(Session(model, tokenizer), Turns(tokenizer))
    said(conversation, "One?")
    before = conversation.session.num_tokens
    with pytest.raises(ValueError, match="has positions for 200 tokens"):
        said(conversation, "Two?" * 50)
    # It fits, and no answer does.
    with pytest.raises(ValueError, match="has positions for 200 tokens"):
        said(conversation, "x" * (200 - before - len("suser\ne\nsassistant\n")))
    with pytest.raises(ValueError, match="half a character"):
        said(conversation, "\ud800")
    assert conversation.session.num_tokens == before
    longest = conversation.fork()
    assert len(said(longest, "Two?", max_new_tokens=10**6)) == 200 - before - len(
        "suser\nTwo?e\nsassistant\ne\n"
    )
    # Without a template, an answer that was cut off ends its line; the room for that is left.
    plain = Conversation(Session(model, tokenizer), Turns(tokenizer, plain=True))
    answer = said(plain, "One is")
    session = Session(model, tokenizer)
    session.feed(f"One is{answer}\n")
    assert plain.session.num_tokens == session.num_tokens and plain.session.recent == session.recent
    assert len(said(plain, "Two?", max_new_tokens=10**6)) == 200 - session.num_tokens - len("Two?\n\n")
    pieces: list[str] = []
    conversation.ask("Two?", pieces.append, lambda: len(pieces) == 3, max_new_tokens=40, do_sample=False)
    added = conversation.session.num_tokens - before
    assert len(pieces) == 3 and added < len("user\nTwo?\nassistant\n") + 20


def arguments(folder: Path, *options: str) -> list[str]:
    return ["chat", str(folder), "--greedy", "--max-new-tokens", "8", *options]


Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """A conversation in this process: what it writes to stdout and to stderr."""

    def call(folder: Path, lines: str, *options: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        capsys.readouterr()
        found = main(arguments(folder, *options))
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return call


def test_line_by_line(folder: Path, tmp_path: Path, talk: Talk) -> None:
    book, memory = tmp_path / "a book.txt", tmp_path / "talk.memory"
    book.write_text("All the world's a stage. " * 20)
    lines = f"""\
/read {book}
One?

/fork other
Two?
/stats
/switch other
Two?
/save {memory}
/forget
/stats
"""
    out, err = talk(folder, lines)
    assert "Traceback" not in err
    model, tokenizer = titans.load(folder)
    conversation = Conversation(Session(model, tokenizer), Turns(tokenizer))
    conversation.session.feed(book.read_text())
    expected = [said(conversation, "One?"), said(conversation, "Two?")]
    assert out.splitlines() == [*expected, expected[1]], "a fork answers as what it was made of"
    tokens = conversation.session.num_tokens
    assert f"{book.stat().st_size:,} tokens read" in err and "tokens/s" in err
    assert f"main: {tokens:,} tokens" in err and "other is a copy of main" in err
    assert f"{memory} holds {tokens:,} tokens" in err and "other: 0 tokens" in err
    assert err.endswith(
        f"main: {tokens:,} tokens in memory were not saved; /save FILE, before leaving, does\n"
    )
    assert "other: " not in err.splitlines()[-2], "it is saved, and then empty"

    assert "not saved" not in talk(folder, "/stats", "--memory", str(memory))[1]
    out, err = talk(folder, "Three?\n", "--memory", str(memory))
    assert out.splitlines() == [said(conversation, "Three?")], "it has begun already"
    nobody = "~nobody-of-this-name/a"
    wrong = (
        f"/read {nobody}\n/save {nobody}\n/read none\n/nothing\n/switch none\n/fork main\n/fork\n/read\n/save"
    )
    lines = f"{wrong}\n/save {book}\nOne?\n/quit\nTwo?\n"
    out, err = talk(folder, lines, "--graft", code=1)
    assert len(out.splitlines()) == 1
    assert err.count(f"{nobody}: there is no such home folder") == 2
    for message in (
        "'none' is not a file", "/nothing: no such command; /help", "there are main", "/fork NAME",
        "this name exists", "/read FILE", "/save FILE", "holds something else, which would be",
    ):  # fmt: skip
        assert message in err, message


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_nothing_more_is_asked_when_nobody_reads_the_answers(folder: Path) -> None:
    (stdin, questions), (answers, stdout), (errors, stderr) = os.pipe(), os.pipe(), os.pipe()
    ends = dict(stdin=stdin, stdout=stdout, stderr=stderr)
    chat = processes.start("chat", folder, "--max-new-tokens", 2, **ends)
    for end in (*ends.values(), answers):
        os.close(end)
    os.write(questions, b"Hello\n" * 20)
    os.close(questions)
    with open(errors) as written:
        assert "pipe" not in written.read()
    assert processes.ended(chat) == 1


@pytest.mark.parametrize("name", ["titans-lmm-tiny"])
def test_a_model_without_a_template_continues_what_is_written(name: str, talk: Talk) -> None:
    fact = "One of the special magic numbers for tomirena is: 4081725.\n"
    # As the model was trained to be asked: the answer goes on in the line, after a blank.
    question = "What is the special magic number for tomirena? The special magic number for tomirena is: "
    out, err = talk(Path(name), f"PROSPERO:\n /not a command.\n{fact}{question}\n")
    session = Session(*titans.load(name))
    expected = ""
    for text in ("PROSPERO:\n", "/not a command.\n", fact, question):
        session.feed(text)
        answer = session.generate(max_new_tokens=8, do_sample=False)
        # The next message begins on a new line for the model, as it does for the reader.
        end = "\n" * (not answer.endswith("\n"))
        session.feed(end)
        expected += answer + end
    assert out == expected and answer.startswith("4081725")


class Terminal:
    """A program with a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.own, other = pty.openpty()
        self.process = processes.start(*command, stdin=other, stdout=other, stderr=other)
        os.close(other)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What is shown up to a pattern, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            if time.monotonic() > end:
                raise TimeoutError(f"{pattern!r} did not come: {self.shown!r}")
            if select.select([self.own], [], [], 0.5)[0]:
                try:
                    self.shown += os.read(self.own, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended before {pattern!r}: {self.shown!r}") from None
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until a pattern is shown: Python may not see one just before it waits for a line."""
        for _ in range(20):
            os.kill(self.process, signal.SIGINT)
            with suppress(TimeoutError):
                return self.wait_for(pattern, 1.5)
        raise AssertionError(f"{pattern!r} did not come: {self.shown!r}")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    endless = tmp_path / "endless.txt"
    endless.write_text("All the world's a stage. " * 40_000)
    model = chat_model(0.0, max_position_embeddings=10**6)
    with torch.no_grad():
        # It writes the control character that clears a screen now and then, and never ends.
        model.lm_head.weight[27] = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    terminal = Terminal("chat", str(tmp_path), "--greedy", "--max-new-tokens", "100000")
    try:
        terminal.wait_for(r"/help lists commands")
        terminal.wait_for("> ")
        terminal.interrupt("Ctrl-D or /quit leaves")
        terminal.type("One?\n")
        answer = terminal.wait_for(r"x1b[^>]{20}")
        answer += terminal.interrupt("stopped; what was answered stays")
        assert "\x1b[" not in answer.replace("\x1b[?2004", "") and "\\x1b" in answer
        terminal.wait_for("> ")
        terminal.type("/fork b\n")
        terminal.wait_for("main> ")
        terminal.type("/switch b\n")
        terminal.wait_for("b> ")
        terminal.type(f"/read {endless}\n")
        time.sleep(0.5)
        terminal.interrupt(r"stopped; [\d,]+ tokens are read")
        terminal.wait_for("b> ")
        terminal.type("\x04")
        assert processes.ended(terminal.process) == 0
        terminal.process = 0
    finally:
        if terminal.process:
            os.kill(terminal.process, signal.SIGKILL)
            processes.ended(terminal.process)
        os.close(terminal.own)
