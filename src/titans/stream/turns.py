"""How the messages of a conversation become text: by the tokenizer's chat template, or plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In a memory's header: some turn of a conversation is in it.
BEGUN = "conversation"
# Stands for an answer where only what surrounds answers is wanted.
_ANSWER = "⟦answer⟧"

Message = Mapping[str, str]


class Turns:
    """How messages are written: by the tokenizer's chat template, or plainly, each with a line end, as has
    every answer, also one that was cut off.

    A plain message that ends with a letter, a digit or a blank is an unfinished line, which the answer
    continues: models without a template were trained to complete sentences, and are so asked for facts.

    Raises:
        ValueError: for a template that cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, plain: bool = False) -> None:
        self.tokenizer, self.plain = tokenizer, plain or not tokenizer.chat_template
        if not self.plain and _ANSWER not in self._rendered(_answered):
            raise ValueError("the chat template leaves out answers: use --plain")

    def first(self, message: str, begins_text: bool) -> str:
        """`opening` of one message by the user; in plain text its line alone."""
        return self.opening([_user(message)], begins_text)

    def later(self, message: str) -> str:
        """`following` of one message by the user."""
        return self.following([_user(message)])

    def opening(self, messages: Sequence[Message], begins_text: bool) -> str:
        """The first messages, with what the template puts before them, such as a system prompt, up to where
        an answer begins.

        Args:
            messages: each with "role" (system, user or assistant) and "content".
            begins_text: whether nothing was read before; otherwise there is no beginning-of-text token.

        Raises:
            ValueError: for messages that the template refuses.
        """
        if self.plain:
            return _lines(messages)
        text, begin = self._rendered(messages, asks=True), self.tokenizer.bos_token
        if begins_text or not begin or self.following(messages[-1:]).startswith(begin):
            return text
        return text.removeprefix(begin)

    def following(self, messages: Sequence[Message]) -> str:
        """Messages that follow an answer and what closes it; ValueError as of `opening`."""
        if self.plain:
            return _lines(messages)
        rest = self._rendered([*_answered, *messages], asks=True).partition(_ANSWER)[2]
        return rest.removeprefix(self.closing)

    @cached_property
    def closing(self) -> str:
        """What stands between an answer and the next message; in plain text a line end."""
        return "\n" if self.plain else self._rendered(_answered).partition(_ANSWER)[2]

    @cached_property
    def end_tokens(self) -> list[int]:
        """Ids that end an answer by the template."""
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return [
            id for id in self.tokenizer.encode(self.closing, add_special_tokens=False)[:1] if id in special
        ]

    def rest_of_closing(self, answer: str, last: int | None) -> str:
        """What closes an answer, all of which is read already.

        Args:
            answer: its text, or the end of it. last: its last token if that ended it, otherwise None.
        """
        if self.plain:
            return "" if answer.endswith("\n") else self.closing
        return self.closing.removeprefix("" if last is None else str(self.tokenizer.decode([last])))

    def _rendered(self, messages: Sequence[Message], asks: bool = False) -> str:
        """Messages as the template writes them; if it asks, an answer begins after the last one."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=asks
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template cannot be used ({reason}): use --plain") from None


def end_tokens(model: object) -> list[int]:
    """Ids that end a text by a model's generation config."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if known is None else [known] if isinstance(known, int) else list(known)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _lines(messages: Sequence[Message]) -> str:
    *before, last = messages
    unfinished = last["role"] == "user" and (last["content"][-1:].isalnum() or last["content"][-1:] == " ")
    return "".join(map(_line, before)) + (last["content"] if unfinished else _line(last))


def _line(message: Message) -> str:
    content = message["content"]
    return content if content.endswith("\n") and message["role"] == "assistant" else f"{content}\n"


_answered: Sequence[Message] = (_user("question"), {"role": "assistant", "content": _ANSWER})
