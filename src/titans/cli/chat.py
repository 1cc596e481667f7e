"""`titans chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions
from titans.cli.outputs import check_output, is_memory
from titans.cli.sampling import Sampling
from titans.cli.terminal import printable, report

if TYPE_CHECKING:
    from titans.cli.conversation import Conversation

_HELP = """\
/read FILE    read a text, a PDF or a folder into the memory; Ctrl-C stops, and the part read so far stays
/fork NAME    copy this conversation under a name, and stay in this one
/switch NAME  go to the conversation of that name; the first one is called main
/save FILE    write the memory, with all messages and texts so far, to a file for --memory
/forget       start this conversation again, with an empty memory
/stats        tokens read, bytes of state, speed, mean surprise
/quit         leave, as Ctrl-D does
Anything else is a message; type a blank before a message that begins with /. Ctrl-C stops an answer.
Without a chat template, a message that ends with a letter, a digit or a blank is continued in its line."""


@dataclass(frozen=True, kw_only=True)
class Chat(Sampling, ModelOptions):
    """Talk with a model, and have it read texts in between.

    Example: titans chat runs/tempest --memory plays.memory

    Messages are written in the model's chat template; a model without one continues what you write, on a new
    line unless the message ends with a letter, a digit or a blank. Type /help for commands. Messages and
    commands may also come from a pipe, one a line; answers go to stdout, everything else to stderr.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model, a graft or any causal model of transformers, or a name of the library:
    titans-smollm2-135m, smollm2-135m, titans-lmm-tiny, titans-mag-tiny, titans-mac-tiny."""
    memory: Path | None = None
    """Start from this file, written before by `titans memorize` or /save. It is not changed: only /save
    writes."""
    max_new_tokens: int = 400
    """The most tokens of an answer."""
    temperature: float = 0.7
    """Of sampling: below 1 favours likely tokens, above 1 unlikely ones."""
    plain: bool = False
    """Use no chat template: each message is a line of text that the model continues."""

    def run(self) -> int:
        """Talk until the input ends."""
        self.check_sampling()
        from titans.cli.conversation import Conversation
        from titans.stream import Session
        from titans.stream.turns import Turns

        model, tokenizer = self.open_model(self.checkpoint)
        turns = Turns(tokenizer, self.plain)
        if self.memory:
            conversation = Conversation.load(self.memory, model, turns)
        else:
            conversation = Conversation(Session(model, tokenizer), turns)
        self.seed_choices()
        if sys.stdin.isatty():
            how = "what you write is continued" if turns.plain else "in its chat template"
            report(f"{self.checkpoint.name}, {how}; /help lists commands")
        return 1 if _Chatting(self, conversation).talk() and not sys.stdin.isatty() else 0


class _Chatting:
    """Runs commands, and passes messages to the conversation."""

    def __init__(self, options: Chat, conversation: Conversation) -> None:
        self.options, self.name, self.kept = options, "main", {"main": conversation}
        # Name → how many tokens the conversation had when it was last loaded or saved.
        self.saved = {"main": conversation.session.num_tokens}
        self.commands: dict[str, Callable[[str], None]] = {
            "/read": self.read, "/fork": self.fork, "/switch": self.switch, "/save": self.save,
            "/forget": self.forget, "/stats": self.stats, "/help": self.help,
        }  # fmt: skip

    @property
    def conversation(self) -> Conversation:
        return self.kept[self.name]

    def talk(self) -> int:
        """Read lines until the input ends; returns how many of them failed."""
        failures = 0
        for line in self.lines():
            word, _, rest = line.strip().partition(" ")
            if line.startswith("/") and word == "/quit":
                break
            try:
                if not line.startswith("/"):
                    # A blank at the end says that a plain line is unfinished.
                    open_line = self.conversation.turns.plain and line.rstrip("\r\n").endswith(" ")
                    self.ask(line.strip() + " " * open_line)
                elif word in self.commands:
                    self.commands[word](rest.strip())
                else:
                    raise UsageError(f"{word}: no such command; /help lists them")
            except KeyboardInterrupt as error:
                report(str(error) or "interrupted")
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (ValueError, OSError, ArithmeticError) as error:
                failures += 1
                report(" ".join(str(error).split()) or type(error).__name__)
        self.say_what_is_lost()
        return failures

    def say_what_is_lost(self) -> None:
        """On leaving: which conversations read something that is in no file."""
        for name, conversation in self.kept.items():
            if (tokens := conversation.session.num_tokens) not in (0, self.saved[name]):
                report(
                    f"{name}: {tokens:,} tokens in memory were not saved; /save FILE, before leaving, does"
                )

    def lines(self) -> Iterator[str]:
        """Lines of the input that are not blank; at a terminal each is asked for."""
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if not sys.stdin.isatty():
            yield from (line for line in sys.stdin if line.strip())
            return
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and keys to edit the line
        while True:
            try:
                prompt = f"{self.name if len(self.kept) > 1 else ''}> "
                if sys.stdout.isatty():
                    line = input(prompt)
                else:
                    print(prompt, end="", file=sys.stderr, flush=True)
                    if not (line := sys.stdin.readline()):
                        raise EOFError
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                report("\nCtrl-D or /quit leaves")
                continue
            if line.strip():
                yield line

    def ask(self, message: str) -> None:
        at_terminal, newest = sys.stdout.isatty(), ""

        def show(piece: str) -> None:
            nonlocal newest
            newest = piece or newest
            print(printable(piece) if at_terminal else piece, end="", flush=True)

        with _interrupts() as interrupted:
            try:
                self.conversation.ask(message, show, interrupted, **self.options.sampling())
                newest = newest or " "
            finally:
                if newest and not newest.endswith("\n"):
                    print(flush=True)
            if interrupted():
                report("stopped; what was answered stays")

    def read(self, rest: str) -> None:
        if not rest:
            raise UsageError("/read FILE: name a text, a PDF or a folder")
        from titans.cli.progress import ReadingProgress

        session, before = self.conversation.session, self.conversation.session.num_tokens
        try:
            self.conversation.read([_path(rest)], ReadingProgress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {session.num_tokens - before:,} tokens are read") from None
        except ValueError as error:
            if session.num_tokens == before:
                raise
            raise ValueError(f"{error}; {session.num_tokens - before:,} tokens before are read") from None
        report(f"{session.num_tokens - before:,} tokens read; {self._held()}")

    def fork(self, name: str) -> None:
        if not name or " " in name:
            raise UsageError("/fork NAME: give one word")
        if name in self.kept:
            raise UsageError(f"/fork {name}: this name exists; /switch {name} goes there")
        self.kept[name] = self.conversation.fork()
        self.saved[name] = self.saved[self.name]
        report(f"{name} is a copy of {self.name}; this is still {self.name}")

    def switch(self, name: str) -> None:
        if name not in self.kept:
            raise UsageError(f"/switch {name}: there are {', '.join(self.kept)}")
        self.name = name
        report(f"{name}: {self._held()}")

    def save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save FILE: name the file to write")
        path = _path(rest)
        check_output("/save", path, is_memory)
        self.conversation.save(path)
        self.saved[self.name] = self.conversation.session.num_tokens
        report(f"{path} holds {self._held()}; the file has {path.stat().st_size:,} bytes")

    def forget(self, rest: str) -> None:
        self.conversation.forget()
        self.saved[self.name] = 0
        report("forgotten; the memory is empty")

    def stats(self, rest: str) -> None:
        stats = self.conversation.session.stats()
        lines = [f"{self.name}: {stats.tokens:,} tokens, {stats.state_bytes:,} bytes of state"]
        if stats.tokens_per_second is not None:
            lines.append(f"read at {stats.tokens_per_second:,.0f} tokens/s")
        if stats.mean_surprise is not None:
            lines.append(f"mean surprise {stats.mean_surprise:.4f}")
        if len(self.kept) > 1:
            lines.append(f"conversations: {', '.join(self.kept)}")
        report("\n".join(lines))

    def help(self, rest: str) -> None:
        report(_HELP)

    def _held(self) -> str:
        stats = self.conversation.session.stats()
        return f"{stats.tokens:,} tokens in {stats.state_bytes:,} bytes of state"


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"{name}: there is no such home folder; begin it with ./ for a file") from None


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only sets a flag; the function it yields returns the flag."""
    seen = False

    def note(*_: object) -> None:
        nonlocal seen
        seen = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
