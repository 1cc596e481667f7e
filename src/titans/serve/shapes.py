"""The forms in which OpenAI's API gives answers, whole and in parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from titans.serve.answer import Answer
from titans.serve.choosing import Chosen
from titans.stream.tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Shape:
    """How the answers of one request are written.

    Args:
        id: of the answer. probabilities: whether those of tokens are reported.

    kind, part: what the whole and its parts are called.
    """

    kind = part = ""
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, id: str, probabilities: bool) -> None:
        self.id, self.probabilities, self.created = id, probabilities, int(time.time())
        # Of every choice: tokens of whose text nothing was sent, and all tokens.
        self._unsent: dict[int, list[Chosen]] = {}
        self._all: dict[int, list[Chosen]] = {}
        self._lengths: dict[int, int] = {}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What is sent before the first token of a choice, if anything is."""
        return None

    def add(self, index: int, chosen: Chosen, text: str) -> dict[str, Any] | None:
        """What is sent for a token, if its text may be shown."""
        self._all.setdefault(index, []).append(chosen)
        unsent = self._unsent.setdefault(index, [])
        unsent.append(chosen)
        if not text:
            return None
        self._unsent[index] = []
        return {"choices": [self._part(index, text, unsent, None)]}

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """What is sent at the end of a choice."""
        unsent, self._unsent[index] = self._unsent.get(index, []), []
        return {"choices": [self._part(index, "", unsent, answer.finish)]}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All choices in one."""
        raise NotImplementedError

    def _part(self, index: int, text: str, chosen: list[Chosen], finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _token(self, id: int) -> str:
        return str(self.tokenizer.decode([id]))

    def _bytes(self, id: int) -> list[int]:
        return [id] if is_byte_tokenizer(self.tokenizer) else list(self._token(id).encode())


class CompletionShape(Shape):
    """Of /v1/completions."""

    kind = part = "text_completion"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        self._lengths.clear()
        return {
            "choices": [
                self._part(index, answer.text, self._all.get(index, []), answer.finish)
                for index, answer in enumerate(answers)
            ]
        }

    def _part(self, index: int, text: str, chosen: list[Chosen], finish: str | None) -> dict[str, Any]:
        found = self._probabilities(index, chosen) if self.probabilities else None
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}

    def _probabilities(self, index: int, chosen: list[Chosen]) -> dict[str, Any]:
        tokens, offsets, offset = [self._token(c.id) for c in chosen], [], self._lengths.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._lengths[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [c.log_prob for c in chosen],
            "top_logprobs": [{self._token(id): value for id, value in c.likeliest} for c in chosen],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    kind, part = "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": self._probabilities(self._all.get(index, [])),
                    "finish_reason": answer.finish,
                }
                for index, answer in enumerate(answers)
            ]
        }

    def _part(self, index: int, text: str, chosen: list[Chosen], finish: str | None) -> dict[str, Any]:
        found = self._probabilities(chosen) if chosen else None
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": finish}

    def _probabilities(self, chosen: list[Chosen]) -> dict[str, Any] | None:
        if not self.probabilities:
            return None
        content = [
            {
                **self._entry(c.id, c.log_prob),
                "top_logprobs": [self._entry(id, value) for id, value in c.likeliest],
            }
            for c in chosen
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, log_prob: float | None) -> dict[str, Any]:
        return {"token": self._token(id), "bytes": self._bytes(id), "logprob": log_prob}
