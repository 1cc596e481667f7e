"""What requests may say: OpenAI's fields, as far as they are met, and the two that name a memory.

A field that would change the answer and is not supported is refused by name; one that only describes the
client is accepted and ignored. Unknown fields are refused, so that a misspelt one is not overlooked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from titans.serve.errors import ApiError

_MOST_STOPS, _MOST_CHOICES = 8, 8
_MOST_FIELDS = 100
Some = TypeVar("Some")
Parsed = TypeVar("Parsed", bound=BaseModel)


def _refused(value: Any) -> Any:
    """Nothing, or what says the same; anything else is not supported."""
    if value:
        raise ValueError("is not supported; leave it out")
    return value


# One wrong entry is enough to refuse a list: errors of millions of them take minutes.
Many = Annotated[list[Some], Field(fail_fast=True)]
# A field of OpenAI's that would change the answer.
Unsupported = Annotated[Any, AfterValidator(_refused)]


class Body(BaseModel):
    """Any body: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # Each unknown one is an error of its own.
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"it has more than {_MOST_FIELDS} fields")
        return value


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """The fields that completions and chat completions share."""

    model: str | None = None
    memory: str | None = None
    remember: bool | None = None
    n: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Many[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Unsupported = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > _MOST_STOPS or not all(0 < len(stop) <= 1000 for stop in stops):
            raise ValueError(f"give up to {_MOST_STOPS} texts of 1 to 1000 characters")
        return stops

    @model_validator(mode="after")
    def _one_trace(self) -> Sampling:
        if self.memory is not None and self.remember is not False and (self.n or 1) > 1:
            raise ValueError("n > 1 with a memory: one answer can be remembered; give remember=false or n=1")
        return self

    @property
    def stops(self) -> list[str]:
        return list(self.stop or [])


class CompletionBody(Sampling):
    """A body of /v1/completions."""

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Unsupported = None
    best_of: int | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _one_choice_each(self) -> CompletionBody:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; leave it out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]


class Part(Body):
    type: Literal["text", "refusal"]
    text: str


class MessageBody(Body):
    """One message; its content may come in parts of text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[Part] | None = None
    name: str | None = None
    refusal: Any = None
    tool_calls: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Any = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Body):
    type: Literal["text"]


class ChatBody(Sampling):
    """A body of /v1/chat/completions."""

    messages: Many[MessageBody] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Unsupported = None
    functions: Unsupported = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    modalities: Many[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _top_of_known(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class NewMemoryBody(Body):
    """A body of POST /v1/memories."""

    model: str | None = None
    copy_of: str | None = None


class ReadBody(Body):
    """A body of POST /v1/memories/{id}/read. stream: send progress; detail: with every token's surprise."""

    text: str = Field(min_length=1)
    stream: bool = False
    detail: bool = False


def parsed(kind: type[Parsed], content: bytes) -> Parsed:
    """A body from JSON; 400 naming the first field that is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = [str(part) for part in first["loc"]]
        # Alternatives of a union are parts of the place, and no fields.
        field = ".".join(part for part in place if part.isidentifier() or part.isdigit()) or None
        if first["type"] == "json_invalid":
            message = f"the body is no valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
        else:
            message = f"{place[0] if place else 'the body'}: {first['msg'].removeprefix('Value error, ')}"
        raise ApiError(400, message[:500], param=field and field[:100], code="invalid_body") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_body") from None
