"""The server: /v1/chat/completions, /v1/completions, /v1/models and /health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from suwen.api.guard import Guard
from suwen.api.schema import ChatRequest, CompletionRequest, Request
from suwen.batching import Batcher, Busy, Closed
from suwen.encoding import ChatEncoder
from suwen.generation import AnswerDecoder, Piece
from suwen.generation_settings import GenerationSettings
from suwen.prompts import with_system_prompt
from suwen.retrieval.grounding import NOT_FOUND, Prepared, check_citations, prepare, source_rows
from suwen.retrieval.search import KnowledgeBase


@dataclass(frozen=True)
class ServedModel:
    """A name that clients choose, and what answers under it."""

    encoder: ChatEncoder
    adapters: tuple[str, ...] = ()
    root: str = ""  # the folder, for /v1/models


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 1 << 20
    answer_tokens: int = 4096
    seconds: float = 300.0  # for one request, waiting included


class Api:
    """What the endpoints share. The model decodes in the batcher's thread, prompts are made in another one."""

    def __init__(
        self,
        batcher: Batcher,
        models: dict[str, ServedModel],
        settings: GenerationSettings,
        limits: Limits,
        system_prompt: str = "",
        knowledge: KnowledgeBase | None = None,
    ) -> None:
        self.batcher, self.models, self.settings, self.limits = batcher, models, settings, limits
        self.system_prompt, self.knowledge = system_prompt, knowledge
        self.started = int(time.time())
        self.preparing = ThreadPoolExecutor(1, "prompts")  # one: a tokenizer is not made for several threads

    def model(self, name: str) -> ServedModel:
        if name not in self.models:
            known = ", ".join(self.models)
            raise HTTPException(404, f"model {name!r} does not exist; known: {known}")
        return self.models[name]

    def request_settings(self, request: Request) -> GenerationSettings:
        """The server's settings with what the request says."""
        given: dict[str, Any] = {
            "max_new_tokens": request.answer_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(request.top_k, 0),
            "repetition_penalty": request.repetition_penalty,
            "seed": request.seed,
        }
        settings = replace(self.settings, **{name: value for name, value in given.items() if value is not None})
        if settings.max_new_tokens > self.limits.answer_tokens:
            raise HTTPException(
                400, f"max_tokens: found {settings.max_new_tokens}, expected at most {self.limits.answer_tokens}"
            )
        return settings

    async def prepare(self, function: Any, *arguments: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.preparing, function, *arguments)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    def chat_prompt(self, request: ChatRequest, settings: GenerationSettings) -> Prepared:
        messages = with_system_prompt([message.to_dict() for message in request.messages], self.system_prompt)
        encoder = self.model(request.model).encoder
        if request.thinking is not None and request.thinking != encoder.thinking:
            encoder = ChatEncoder(encoder.tokenizer, request.thinking)
        knowledge = self.knowledge if request.retrieval else None
        return prepare(encoder, messages, self.batcher.window, settings.max_new_tokens, knowledge)

    def completion_prompt(self, request: CompletionRequest) -> Prepared:
        tokenizer = self.model(request.model).encoder.tokenizer
        if isinstance(request.prompt, str):
            ids = tokenizer(request.prompt)["input_ids"]
        else:
            ids = request.prompt
            rows = self.batcher.model.get_input_embeddings().weight.shape[0]
            if not all(0 <= token < rows for token in ids):
                raise ValueError(f"prompt: found a token outside of 0 to {rows - 1}")
        if not ids:
            raise ValueError("prompt: found nothing, expected text or tokens")
        return Prepared(ids, 0)


@dataclass
class Answering:
    """An answer on its way: pieces of text, then its end."""

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class StopTexts:
    """Cut an answer at the first of some texts, and hold back what may be the beginning of one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.held, self.found = texts, "", False

    def push(self, text: str) -> str:
        if not self.texts:
            return text
        self.held += text
        places = [place for stop in self.texts if (place := self.held.find(stop)) >= 0]
        if places:
            self.found = True
            return self.held[: min(places)]
        keep = max(
            (size for stop in self.texts for size in range(1, len(stop)) if self.held.endswith(stop[:size])), default=0
        )
        given, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return given


async def answer(
    api: Api, request: Request, prepared: Prepared, settings: GenerationSettings, state: Answering, raw: bool
) -> AsyncGenerator[Piece, None]:
    """The pieces of an answer as they come; `state` tells in the end why it ended.

    Args:
        raw: a completion: the thinking part is text like any other.
    """
    if prepared.abstained:
        yield Piece("content", NOT_FOUND)
        state.finish_reason = "stop"
        return
    served = api.model(request.model)
    loop, items = asyncio.get_running_loop(), asyncio.Queue[Any]()
    held: list[int] = []  # tokens of an answer that nobody watches: the loop is woken once, not for each of them
    watched = request.stream or bool(request.stops)

    def send(item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(items.put_nowait, item)

    def deliver(item: int | None | Exception) -> None:
        if isinstance(item, int):
            held.append(item)
        if held and (watched or not isinstance(item, int)):
            send(held.copy())
            held.clear()
        if not isinstance(item, int):
            send(item)

    stop_ids = served.encoder.stop_token_ids
    submitted = api.batcher.submit(prepared.ids, settings, stop_ids, deliver, served.adapters)
    decoder = AnswerDecoder(served.encoder, prepared.ids)
    if raw:
        decoder.state = "content"
        decoder.spaces = ""
    stops = StopTexts(request.stops)
    deadline = loop.time() + api.limits.seconds
    try:
        item: Any = []
        while item is not None:
            item = await asyncio.wait_for(items.get(), deadline - loop.time())
            if isinstance(item, Exception):
                raise item
            pieces: list[Piece] = []
            for token in item or ():
                state.completion_tokens += 1
                state.finish_reason = "stop" if token in stop_ids else "length"
                pieces += decoder.push(token)
            for kind, text in decoder.finish() if item is None else pieces:
                given = stops.push(text) if kind == "content" else text
                if given:
                    yield Piece(kind, given)
                if stops.found:
                    state.finish_reason = "stop"
                    return
        if stops.held:
            yield Piece("content", stops.held)
    finally:
        submitted.cancel()


def build_app(api: Api, api_key: str | None = None, patience: float = 20.0) -> FastAPI:
    """The ASGI application.

    Args:
        api_key: what clients must send as a bearer token; None for a server on this machine only.
        patience: seconds that answers at work are given when the server ends.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(api.batcher.close, patience)
        api.preparing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, body_bytes=api.limits.body_bytes, authorised=_authorisation(api_key))

    @app.get("/health")
    async def health() -> JSONResponse:
        working, waiting = api.batcher.load()
        alive = api.batcher.thread.is_alive()
        status = {"status": "ok" if alive else "stopped", "working": working, "waiting": waiting}
        return JSONResponse(status, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        rows = [
            {"id": name, "object": "model", "created": api.started, "owned_by": "suwen", "root": served.root}
            for name, served in api.models.items()
        ]
        return {"object": "list", "data": rows}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Any:
        api.model(request.model)
        settings = api.request_settings(request)
        prepared = await api.prepare(api.chat_prompt, request, settings)
        return await respond(api, request, prepared, settings, http, chat_shape)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Any:
        api.model(request.model)
        settings = api.request_settings(request)
        prepared = await api.prepare(api.completion_prompt, request)
        return await respond(api, request, prepared, settings, http, completion_shape)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not valid JSON: {first['ctx']['error']}")
        if first["type"] == "model_attributes_type" and len(first["loc"]) == 1:
            return error_response(400, "the body is not a JSON object; expected one, sent as application/json")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        return error_response(400, f"{place}: {message}" if place else message, param=place or None)

    @app.exception_handler(StarletteHTTPException)
    async def refused(http: HttpRequest, error: StarletteHTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    return app


def _authorisation(api_key: str | None) -> Any:
    def authorised(header: str) -> bool:
        if api_key is None:
            return True
        scheme, _, token = header.partition(" ")
        # Compared in constant time, so that the time of a refusal tells nothing
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), api_key.encode())

    return authorised


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_body(status, message, param), status, headers)


def failure(error: BaseException) -> tuple[int, str]:
    """Status and message of what went wrong while answering; inner messages stay inside."""
    if isinstance(error, Busy):
        return 429, f"the server is busy: {error}"
    if isinstance(error, TimeoutError):
        return 504, "the answer took too long"
    if isinstance(error, ValueError):
        return 400, str(error)
    if isinstance(error, Closed):
        return 503, "the server is shutting down"
    return 500, "the model failed on this request"


# The shapes of OpenAI's objects: of a whole answer, and of a part of a stream.


def chat_shape(parts: dict[str, str], finish: str | None, whole: bool) -> tuple[str, dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant"} if whole else {}
    message |= {"reasoning_content": parts["reasoning"]} if parts.get("reasoning") else {}
    if whole or "content" in parts:
        message["content"] = parts.get("content", "")
    if whole:
        return "chat.completion", {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return "chat.completion.chunk", {"index": 0, "delta": message, "finish_reason": finish, "logprobs": None}


def completion_shape(parts: dict[str, str], finish: str | None, whole: bool) -> tuple[str, dict[str, Any]]:
    return "text_completion", {
        "index": 0,
        "text": parts.get("content", ""),
        "finish_reason": finish,
        "logprobs": None,
    }


async def respond(
    api: Api, request: Request, prepared: Prepared, settings: GenerationSettings, http: HttpRequest, shape: Any
) -> Any:
    state = Answering(len(prepared.ids))
    raw = shape is completion_shape
    pieces = answer(api, request, prepared, settings, state, raw)
    base = {"id": f"{'cmpl' if raw else 'chatcmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}

    def build(parts: dict[str, str], finish: str | None, whole: bool, **more: Any) -> dict[str, Any]:
        kind, choice = shape(parts, finish, whole)
        return base | {"object": kind, "model": request.model, "choices": [choice]} | more

    sources: dict[str, Any] = {}
    if api.knowledge is not None and not raw and (prepared.hits or prepared.abstained):
        sources = {"sources": source_rows(prepared.hits)}

    try:
        if request.stream:
            # The first piece is waited for here, so that a full queue is answered by its status
            first = await unless_gone(http, anext(pieces, None))
            body = events(api, request, prepared, pieces, first, state, build, sources)
            return StreamingResponse(body, media_type="text/event-stream")
        parts = {"reasoning": "", "content": ""}

        async def gather() -> None:
            async for kind, text in pieces:
                parts[kind] += text

        await unless_gone(http, gather())
    except Gone:
        await pieces.aclose()
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        await pieces.aclose()
        return error_response(*failure(error))
    if sources:
        sources["citations"] = vars(check_citations(parts["content"], [hit.passage for hit in prepared.hits]))
    return build(parts, state.finish_reason, True, usage=state.usage, **sources)


class Gone(Exception):
    """The client left."""


async def unless_gone(http: HttpRequest, work: Any) -> Any:
    """The result of `work`, which ends when the client leaves."""

    async def leaving() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.create_task(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def events(
    api: Api,
    request: Request,
    prepared: Prepared,
    pieces: Any,
    first: Piece | None,
    state: Answering,
    build: Any,
    sources: dict[str, Any],
) -> AsyncIterator[str]:
    """Server-sent events; closing it, as a client does that leaves, stops the model."""

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    text = ""
    try:
        opening = build({"content": ""}, None, False, **sources)
        if isinstance(request, ChatRequest):
            opening["choices"][0]["delta"]["role"] = "assistant"
            yield event(opening)
        while first is not None:
            if first.kind == "content":
                text += first.text
            yield event(build({first.kind: first.text}, None, False))
            first = await anext(pieces, None)
        checked = {}
        if sources:
            checked = {"citations": vars(check_citations(text, [hit.passage for hit in prepared.hits]))}
        yield event(build({}, state.finish_reason, False, **checked))
        if request.stream_options and request.stream_options.include_usage:
            yield event(build({}, None, False, usage=state.usage) | {"choices": []})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(error_body(*failure(error)))
    finally:
        await pieces.aclose()
