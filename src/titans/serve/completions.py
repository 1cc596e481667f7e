"""The routes of OpenAI's API: models, completions and chat completions, with a memory or without."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from torch import Tensor

from titans.serve.answer import Answer
from titans.serve.bodies import ChatBody, CompletionBody, Sampling, parsed
from titans.serve.choosing import Chooser, Chosen
from titans.serve.engine import Engine
from titans.serve.errors import ApiError
from titans.serve.events import Events, respond
from titans.serve.guard import json_body, note, owner
from titans.serve.memories import Memory, State
from titans.serve.service import Deadline, Service
from titans.serve.shapes import ChatShape, CompletionShape, Shape
from titans.stream import Session
from titans.stream.text import token_ids
from titans.stream.tokenizer import leading_tokens
from titans.stream.turns import end_tokens

_DEFAULT_COMPLETION, _MOST_ANSWERS = 16, 64
# A text of so many characters is cut into tokens by another thread.
_LONG = 10_000


def routes(service: Service) -> APIRouter:
    """The routes, for an application."""
    router = APIRouter()

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "titans"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.engines]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model(service.engine(name).name)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parsed(CompletionBody, await json_body(request))
        return await respond(request, _Completions(service, request, body).events(), bool(body.stream))

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = parsed(ChatBody, await json_body(request))
        return await respond(request, _Chat(service, request, body).events(), bool(body.stream))

    return router


@dataclass
class _Choice:
    """One of the answers of a request. before: as the session was when the answer began."""

    session: Session
    before: Session
    answer: Answer
    chooser: Chooser


class _Task:
    """What completions and chats have in common: read prompts, answer each, and remember it."""

    def __init__(self, service: Service, request: Request, body: Sampling, shape: Shape) -> None:
        self.service, self.request, self.body, self.shape = service, request, body, shape
        self.deadline = Deadline(service.settings.request_seconds)
        self.memory: Memory | None = None
        if body.memory is not None:
            self.memory = service.memories.get(owner(request), body.memory)
        self.engine: Engine = service.engine(body.model, self.memory)
        self.prompt_tokens = self.completion_tokens = 0

    async def prompts(self, state: State) -> list[Tensor]:
        """The ids that are read before each answer."""
        raise NotImplementedError

    def most(self, session: Session) -> int:
        """How many tokens an answer may have."""
        raise NotImplementedError

    def ends(self) -> list[int]:
        """Ids that end an answer."""
        return end_tokens(self.engine.reader.inner)

    def num_likeliest(self) -> int | None:
        """How many likely tokens are reported; None for no probabilities."""
        raise NotImplementedError

    async def close_turn(self, choice: _Choice) -> bool:
        """Read what belongs behind an answer that is remembered; whether a conversation has begun."""
        raise NotImplementedError

    async def events(self) -> Events:
        """See `titans.serve.events`."""
        remembered = self.memory if self.body.remember is not False else None
        async with AsyncExitStack() as stack:
            stack.enter_context(self.service.admitted())
            if remembered is not None:
                await self.deadline.wait(remembered.turn.acquire())
                stack.callback(remembered.turn.release)
            state = await self.service.state(self.memory, self.engine)
            choices = self._choices(state.session, await self.prompts(state))
            yield None
            await self._read()
            try:
                async with aclosing(self._answer(choices)) as parts:
                    async for part in parts:
                        yield part
            finally:
                note(self.request, prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)
            if remembered is not None:
                (choice,) = choices
                if choice.answer.cut:
                    await self._read_what_was_shown(choice)
                begun = await self.close_turn(choice) or state.begun
                await self.service.commit(remembered, State(choice.session, begun))
            for index, choice in enumerate(choices):
                yield self._head() | self.shape.end(index, choice.answer)
            usage = self._usage()
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield self._head() | {"choices": [], "usage": usage}
            if not self.body.stream:
                answers = [choice.answer for choice in choices]
                yield self._head(whole=True) | self.shape.whole(answers) | {"usage": usage}

    def _choices(self, start: Session, prompts: Sequence[Tensor]) -> list[_Choice]:
        """A session and an answer for each choice, nothing read yet.

        Raises:
            ApiError: for a prompt that the model has no positions for, or an empty one.
        """
        body, settings = self.body, self.service.settings
        self._to_read: list[tuple[Session, Tensor]] = []
        choices = []
        for ids in prompts:
            session = start.fork()
            if not len(ids) and not session.num_tokens:
                raise ApiError(400, "the prompt is empty: give at least one token", param="prompt")
            self._to_read.append((session, ids))
            self.prompt_tokens += len(ids)
            most = self._within_room(session, len(ids), self.most(session))
            if most > settings.max_tokens:
                raise ApiError(
                    400, f"max_tokens is {most:,}: give at most {settings.max_tokens:,}", param="max_tokens"
                )
            recent = (*session.recent, *ids[-8:].tolist())[-8:]
            for number in range(body.n or 1):
                # Every choice of a request with a seed has a seed of its own.
                seed = None if body.seed is None else (body.seed + number) % 2**63
                chooser = Chooser(
                    1.0 if body.temperature is None else body.temperature,
                    1.0 if body.top_p is None else body.top_p,
                    seed,
                    self.num_likeliest(),
                    body.presence_penalty or 0.0,
                    body.frequency_penalty or 0.0,
                )
                answer = Answer(self.engine.tokenizer, recent, stops=body.stops, ends=self.ends(), most=most)
                choices.append(_Choice(session, session, answer, chooser))
        return choices

    def _within_room(self, session: Session, prompt: int, most: int) -> int:
        """So many tokens, or as many as the model has positions for behind the prompt."""
        tokens = session.num_tokens + prompt
        try:
            session.reader.check_room(tokens + 1)
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        limit = session.reader.most_tokens
        return most if limit is None else min(most, limit - tokens)

    async def _read(self) -> None:
        work = [self.engine.read(session, ids) for session, ids in self._to_read]
        await self.deadline.wait(asyncio.gather(*work))

    async def _answer(self, choices: Sequence[_Choice]) -> AsyncGenerator[dict[str, Any], None]:
        """Generate all choices at once; a part for each piece of text of any."""
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Any]()
        work = []
        for index, choice in enumerate(choices):
            choice.before = choice.session.fork()
            choice.session = choice.before.fork()

            def show(chosen: Chosen, text: str, index: int = index) -> None:
                loop.call_soon_threadsafe(parts.put_nowait, (index, chosen, text))

            work.append(self.engine.generate(choice.session, choice.chooser, choice.answer, show))
        generating = asyncio.ensure_future(asyncio.gather(*work))
        generating.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            for index in range(len(choices)):
                if (event := self.shape.begin(index)) is not None:
                    yield self._head() | event
            while (part := await self.deadline.wait(parts.get())) is not None:
                index, chosen, text = part
                self.completion_tokens += 1
                if (event := self.shape.add(index, chosen, text)) is not None:
                    yield self._head() | event
            await generating
        finally:
            generating.cancel()
            await asyncio.gather(generating, return_exceptions=True)

    async def _read_what_was_shown(self, choice: _Choice) -> None:
        """A memory cannot take tokens back: read the answer up to the stop text again, from before it."""
        ids, rest = choice.answer.kept()
        more = token_ids(rest, self.engine.tokenizer, self.engine.reader.vocab_size).long()
        choice.session = choice.before.fork()
        both = torch.cat([torch.tensor(ids, dtype=torch.int64), more])
        await self.deadline.wait(self.engine.read(choice.session, both))

    def _head(self, whole: bool = False) -> dict[str, Any]:
        memory = {} if self.memory is None else {"memory": self.memory.id}
        kind = self.shape.kind if whole else self.shape.part
        return {
            "id": self.shape.id, "object": kind, "created": self.shape.created,
            "model": self.engine.name, **memory,
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    async def _ids(self, text: str | list[int]) -> Tensor:
        """The ids of a text, or those given."""
        arguments = (text, self.engine.tokenizer, self.engine.reader.vocab_size)
        try:
            if len(text) > _LONG:
                return (await asyncio.to_thread(token_ids, *arguments)).long()
            return token_ids(*arguments).long()
        except (ValueError, OverflowError, RuntimeError) as error:
            raise ApiError(400, " ".join(str(error).split())[:500], code="invalid_prompt") from None


class _Completions(_Task):
    """A request to continue texts."""

    body: CompletionBody

    def __init__(self, service: Service, request: Request, body: CompletionBody) -> None:
        super().__init__(
            service, request, body, CompletionShape(service_id("cmpl"), body.logprobs is not None)
        )
        self.shape.tokenizer = self.engine.tokenizer
        prompts, remembers = len(body.prompts), self.memory is not None and body.remember is not False
        if not 0 < prompts * (body.n or 1) <= _MOST_ANSWERS or (prompts > 1 and remembers):
            raise ApiError(
                400,
                f"prompt: give at least one, for up to {_MOST_ANSWERS} answers, and one alone with a memory "
                "that remembers",
                param="prompt",
            )

    async def prompts(self, state: State) -> list[Tensor]:
        found = [await self._ids(prompt) for prompt in self.body.prompts]
        if state.session.num_tokens:
            return found
        leading = torch.tensor(leading_tokens(self.engine.tokenizer), dtype=torch.int64)
        return [
            ids if isinstance(prompt, list) else torch.cat([leading, ids])
            for prompt, ids in zip(self.body.prompts, found, strict=True)
        ]

    def most(self, session: Session) -> int:
        return self.body.max_tokens or _DEFAULT_COMPLETION

    def num_likeliest(self) -> int | None:
        return self.body.logprobs

    async def close_turn(self, choice: _Choice) -> bool:
        return False


class _Chat(_Task):
    """A request to answer messages."""

    body: ChatBody

    def __init__(self, service: Service, request: Request, body: ChatBody) -> None:
        super().__init__(service, request, body, ChatShape(service_id("chatcmpl"), bool(body.logprobs)))
        self.shape.tokenizer = self.engine.tokenizer
        self.turns = service.turns[self.engine.name]

    async def prompts(self, state: State) -> list[Tensor]:
        messages = [message.plain() for message in self.body.messages]
        try:
            if state.begun:
                text = self.turns.following(messages)
            else:
                text = self.turns.opening(messages, begins_text=not state.session.num_tokens)
        except ValueError as error:
            reason = str(error).removesuffix(": use --plain")
            raise ApiError(400, reason[:500], param="messages", code="invalid_messages") from None
        return [await self._ids(text)]

    def most(self, session: Session) -> int:
        asked = self.body.max_completion_tokens or self.body.max_tokens
        return asked or self.service.settings.default_tokens

    def ends(self) -> list[int]:
        return list(dict.fromkeys([*super().ends(), *self.turns.end_tokens]))

    def num_likeliest(self) -> int | None:
        return (self.body.top_logprobs or 0) if self.body.logprobs else None

    async def close_turn(self, choice: _Choice) -> bool:
        answer = choice.answer
        closing = self.turns.rest_of_closing(answer.text, None if answer.cut else answer.ended_by)
        ids = await self._ids(closing)
        try:
            await self.deadline.wait(self.engine.read(choice.session, ids))
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        return True


def service_id(kind: str) -> str:
    """The name of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"
