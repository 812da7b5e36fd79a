"""What clients may send: OpenAI's requests, as far as a text model answers them. What cannot be honoured is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

UNAVAILABLE = {
    "tools": "this server calls no tools",
    "functions": "this server calls no tools",
    "logprobs": "token probabilities are not returned",
    "top_logprobs": "token probabilities are not returned",
    "logit_bias": "not available",
    "audio": "text only",
    "suffix": "not available",
    "echo": "not available",
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    reasoning_content: str | None = None

    def to_dict(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.reasoning_content and self.role == "assistant":
            message["reasoning_content"] = self.reasoning_content
        return message


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of requests share. Unknown fields are passed over, as OpenAI's own server does."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # vLLM's; -1 and 0: all
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None  # vLLM's
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_unavailable(self) -> Request:
        for name, reason in UNAVAILABLE.items():
            if (self.model_extra or {}).get(name) not in (None, False, 0, [], {}):
                raise ValueError(f"{name}: {reason}")
        form: Any = (self.model_extra or {}).get("response_format")
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            raise ValueError("response_format: text only")
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError("stop: found more than four or an empty one, expected up to four texts")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's; enable_thinking is honoured
    retrieval: bool = True  # ours: False answers without the knowledge base

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def thinking(self) -> bool | None:
        value = (self.chat_template_kwargs or {}).get("enable_thinking")
        return value if isinstance(value, bool) else None


class CompletionRequest(Request):
    prompt: str | list[int]
