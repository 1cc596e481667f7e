"""Blocks of tokens that state facts inside other text, and blocks that ask for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from titans.data.facts import Chat, FactGroup, Sentence, make_facts
from titans.stream.tokenizer import leading_tokens

# Flags of tokens: of a value where it is stated; of a value that answers a question; the token after one.
STATED, ANSWER, ANSWER_END = 1, 2, 3
# Characters that a token has at most on average; a text of so many has enough tokens.
_LONGEST_TOKENS = 12
_LINE_BREAKS = 0.2


@dataclass(frozen=True)
class Block:
    """ids: (length,) int64. flags: (length,) uint8, 0 or one of STATED, ANSWER and ANSWER_END."""

    ids: np.ndarray
    flags: np.ndarray


@dataclass(frozen=True)
class Episode:
    """A block that states the facts of a group, and one that asks for them.

    asked: which facts, in the order of the questions.
    """

    group: FactGroup
    statements: Block
    questions: Block
    asked: tuple[int, ...]

    def about(self) -> dict[str, Any]:
        """For a JSON file."""
        facts = [asdict(fact) for fact in self.group.facts]
        return {"kind": self.group.kind, "facts": facts, "asked": list(self.asked)}


class Episodes:
    """Draws episodes.

    Args:
        tokenizer: a fast one of transformers, which gives each token's characters.
        fillers: texts between the facts; each of at least 1,000 characters.
        words: see `make_facts`. chat: likewise.
        length: tokens of a block, with those that the tokenizer puts before a text. most: facts of a group.

    Raises:
        ValueError: for a tokenizer that does not give offsets, or no filler that is long enough.
    """

    def __init__(
        self,
        tokenizer: Any,
        fillers: Sequence[str],
        words: Sequence[str],
        *,
        length: int = 128,
        most: int = 4,
        chat: Chat | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}: give a fast one, with offsets")
        self.fillers = [text for text in fillers if len(text) >= 1000]
        if not self.fillers:
            raise ValueError("fillers: give a text of at least 1,000 characters")
        self.tokenizer, self.words, self.chat = tokenizer, words, chat
        self.leading = np.array(leading_tokens(tokenizer), dtype=np.int64)
        self.length, self.most = length, most

    def draw(
        self, generator: np.random.Generator, *, held_out: bool = False, held_out_wording: bool = False
    ) -> Episode:
        """An episode of 1 to `most` facts, mostly of `most`.

        Facts whose questions find no place in the block are not asked for; one always is.
        """
        for _ in range(100):
            count = self.most - min(int(generator.geometric(0.6)) - 1, self.most - 1)
            group = make_facts(
                generator,
                self.words,
                count,
                held_out=held_out,
                held_out_wording=held_out_wording,
                chat=self.chat,
            )
            statements = self._block(generator, group.statements, STATED)
            if statements is None:
                continue
            order = generator.permutation(count).tolist()
            while order:
                questions = self._block(generator, [group.questions[i] for i in order], ANSWER)
                if questions is not None:
                    return Episode(group, statements, questions, tuple(order))
                order.pop()
        raise ValueError(f"length={self.length}: too short for a fact; give at least 64")

    def _block(
        self, generator: np.random.Generator, sentences: Sequence[Sentence], flag: int
    ) -> Block | None:
        """The sentences inside filler, in their order; None if they need more tokens."""
        shares = generator.dirichlet(np.ones(len(sentences) + 1))[:-1]
        room = 4.0 * self.length - sum(len(sentence.text) for sentence in sentences)
        joint = "\n" if generator.random() < _LINE_BREAKS else " "
        for filler in (max(room, 0.0), room / 2, 0.0):
            text, spans = "", []
            for share, sentence in zip(shares, sentences, strict=True):
                text += self._filler(generator, int(max(filler, 0.0) * share), joint)
                spans.append((len(text) + sentence.begin, len(text) + sentence.end))
                text += sentence.text + joint
            text += self._filler(generator, _LONGEST_TOKENS * self.length, joint)
            block = flagged(self.tokenizer, text, spans, flag)
            ids = np.concatenate([self.leading, block.ids])
            flags = np.concatenate([np.zeros(len(self.leading), np.uint8), block.flags])
            # The last value and the token after it stand inside.
            last = int(np.flatnonzero(flags)[-1]) + (flag == STATED)
            if last < self.length <= len(ids):
                return Block(ids[: self.length], flags[: self.length])
        return None

    def _filler(self, generator: np.random.Generator, count: int, joint: str) -> str:
        """About `count` characters of whole words, and `joint`; nothing for a few."""
        if count < 8:
            return ""
        text = self.fillers[int(generator.integers(len(self.fillers)))]
        begin = int(generator.integers(max(len(text) - count, 1)))
        begin = text.find(" ", begin) + 1
        found = text[begin : begin + count]
        return found.rsplit(" ", 1)[0].strip() + joint


def flagged(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], flag: int) -> Block:
    """Tokens of the text; those of a span (begin, end) in characters get the flag.

    A span of answers has the token of the next character flagged as ANSWER_END.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    flags = np.zeros(len(offsets), dtype=np.uint8)
    for begin, end in spans:
        inside = (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        if flag == ANSWER:
            flags[(offsets[:, 0] < end + 1) & (offsets[:, 1] > end) & ~inside] = ANSWER_END
        flags[inside] = flag
    return Block(np.array(encoded["input_ids"], dtype=np.int64), flags)


def chat_of(tokenizer: Any) -> Chat | None:
    """The marks of the tokenizer's conversations, without a system prompt; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    user, answer = "QUESTION", "ANSWER"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    if text.count(user) != 1 or text.count(answer) != 1:
        return None
    before, rest = text.split(user)
    between, after = rest.split(answer)
    # A template may begin with a system prompt: the last mark of its turn ends it.
    if after.strip() and after.strip() in before:
        before = before.rpartition(after.strip())[2].lstrip()
    return Chat(before, between, after)


def about_json(episodes: Sequence[Episode]) -> str:
    """What several episodes state and ask for."""
    return json.dumps([episode.about() for episode in episodes])
