"""Chat completions from any OpenAI-compatible endpoint: whole ones with retries, many at once, or one that streams.

endpoint = Endpoint("http://127.0.0.1:8000/v1", "suwen")
for index, reply in complete_chats(endpoint, conversations, max_tokens=256, temperature=0):
    ...
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from suwen.formats import THINKING
from suwen.generation_settings import GenerationSettings

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0  # seconds, also where a server asks for more


class EndpointError(ValueError):
    """The endpoint refused a request, or could not be reached after all retries."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. The key comes from the environment (OPENAI_API_KEY) unless given, and is never printed."""

    base_url: str  # http(s)://host[:port][/v1]
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8  # requests under way at once
    retries: int = 6
    timeout: float = 300.0  # seconds, of one request
    first_wait: float = 0.5  # seconds before the first retry; doubled each time
    told: dict[str, object] = field(default_factory=dict, repr=False, compare=False)  # kinds of failure, told already

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--api_base: found {self.base_url!r}, expected a URL such as http://127.0.0.1:8000/v1")
        if not self.model:
            raise ValueError("--model: found nothing, expected the model's name at the endpoint")
        if self.concurrency < 1 or self.retries < 0:
            raise ValueError(
                f"--concurrency: found {self.concurrency} requests and {self.retries} retries, expected 1 and 0 or more"
            )

    @property
    def root(self) -> str:
        base = self.base_url.rstrip("/")
        return base if urlsplit(base).path else f"{base}/v1"

    @property
    def url(self) -> str:
        return f"{self.root}/chat/completions"


class Reply(NamedTuple):
    content: str
    reasoning: str  # the thinking part, where the endpoint gives it apart
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def open_client(endpoint: Endpoint) -> httpx.Client:
    key = endpoint.api_key or os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
    return httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits)


def sampling(settings: GenerationSettings) -> dict[str, Any]:
    """Settings by OpenAI's names; those that only vLLM and api_server.py know, where they are used."""
    asked: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    if settings.temperature:
        asked["top_p"] = settings.top_p
        asked |= {"top_k": settings.top_k} if settings.top_k else {}
        asked |= {"seed": settings.seed} if settings.seed is not None else {}
    if settings.repetition_penalty != 1:
        asked["repetition_penalty"] = settings.repetition_penalty
    return asked


def list_models(endpoint: Endpoint) -> list[str]:
    """The names that an endpoint serves, in its order."""
    url = f"{endpoint.root}/models"
    with open_client(endpoint) as client:
        try:
            response = client.get(url)
        except httpx.TransportError as error:
            raise EndpointError(f"--api_base: {url}: {type(error).__name__}: {error}") from None
    if response.status_code != 200:
        raise EndpointError(f"--api_base: {url}: HTTP {response.status_code}: {error_text(response)}")
    try:
        names = [row["id"] for row in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise EndpointError(f"--api_base: {url}: found no models, expected a list of them; name one by --model")
    return names


def stream_chat(
    endpoint: Endpoint,
    client: httpx.Client,
    messages: Sequence[dict],
    on_usage: Callable[[int], None] = lambda tokens: None,
    **sampling: Any,
) -> Generator[tuple[str, str], None, None]:
    """The parts of one answer as they come, ("reasoning" or "content", text); closing the iterator hangs up.

    Args:
        on_usage: told the answer's tokens at its end, by endpoints that count them.

    Raises:
        EndpointError: refused, lost on the way, or an answer of another shape. There are no retries.
    """
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": endpoint.model, "messages": list(messages), **options, **sampling}
    try:
        with client.stream("POST", endpoint.url, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise EndpointError(f"{endpoint.url}: HTTP {response.status_code}: {error_text(response)}")
            for line in _lines(response):
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield from _stream_parts(endpoint, data, on_usage)
    except httpx.HTTPError as error:
        raise EndpointError(f"{endpoint.url}: {type(error).__name__}: {error}") from None


def _lines(response: httpx.Response) -> Iterator[str]:
    """Lines as server-sent events mean them; httpx would also break at the U+2028 of a text."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in lines)
    yield rest.decode("utf-8", errors="replace")


def _stream_parts(endpoint: Endpoint, data: str, on_usage: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    try:
        event = json.loads(data)
        if "error" in event:
            raise EndpointError(f"{endpoint.url}: {event['error'].get('message', event['error'])}")
        if usage := event.get("usage"):
            on_usage(usage["completion_tokens"])
        for choice in event["choices"][:1]:
            for kind, name in (("reasoning", "reasoning_content"), ("content", "content")):
                if part := choice["delta"].get(name):
                    yield kind, part
    except EndpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EndpointError(f"{endpoint.url}: found {data[:120]!r}, expected a part of a chat completion") from None


def complete_chat(
    endpoint: Endpoint,
    client: httpx.Client,
    messages: Sequence[dict],
    before_each: Callable[[], None] = lambda: None,
    **sampling: Any,
) -> Reply:
    """Ask once, again where that may help: lost connections, timeouts, full servers (Retry-After is kept to).

    Args:
        before_each: called before every request, retries among them.

    Raises:
        EndpointError: refused for good, no answer after all retries, or an answer of another shape.
    """
    body = {"model": endpoint.model, "messages": list(messages), **sampling}
    pause, problem = endpoint.first_wait, ""
    for attempt in range(endpoint.retries + 1):
        if attempt:
            if attempt == 2:  # a second later it is no hiccup
                _tell_of_retries(endpoint, problem)
            time.sleep(min(LONGEST_WAIT, pause))
            pause = endpoint.first_wait * 2**attempt * random.uniform(0.75, 1.25)  # not all threads at once
        before_each()
        try:
            response = client.post(endpoint.url, json=body)
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if response.status_code == 200:
            return read_reply(endpoint, response)
        problem = f"HTTP {response.status_code}: {error_text(response)}"
        if response.status_code not in RETRIED:
            raise EndpointError(f"{endpoint.url}: {problem}")
        try:
            pause = max(pause, float(response.headers.get("retry-after", "")))
        except ValueError:
            pass  # absent, or a date
    raise EndpointError(f"{endpoint.url}: no answer after {endpoint.retries + 1} attempts ({problem})")


def _tell_of_retries(endpoint: Endpoint, problem: str) -> None:
    """On stderr; of many requests under way that meet the same kind of problem, one says it."""
    kind, me = problem.partition(":")[0], object()  # what follows the kind may name the request
    if endpoint.told.setdefault(kind, me) is me:
        times = f"{endpoint.retries + 1} times in all"
        print(f"{endpoint.url}: {problem}; trying again, {times}", file=sys.stderr, flush=True)


def error_text(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200] or "no message"


def read_reply(endpoint: Endpoint, response: httpx.Response) -> Reply:
    try:
        body = response.json()
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
        if not reasoning and (inline := THINKING.fullmatch(content)):
            reasoning, content = inline[1].strip(), inline[2]
        return Reply(
            content,
            reasoning,
            choice.get("finish_reason") or "",
            usage.get("prompt_tokens") or 0,
            usage.get("completion_tokens") or 0,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        found = " ".join(response.text.split())[:120]
        raise EndpointError(f"{endpoint.url}: found {found!r}, expected a chat completion with choices") from None


def complete_chats(
    endpoint: Endpoint,
    conversations: Iterable[Sequence[dict]],
    seeds: Sequence[int] | None = None,
    **sampling: Any,
) -> Iterator[tuple[int, Reply]]:
    """Ask many at once; yields (place in `conversations`, reply) as replies come, the order is the server's.

    No more than twice `endpoint.concurrency` conversations are taken ahead. Closing the iterator, or an error of one
    request, cancels those not yet sent.

    Args:
        seeds: one for each conversation.
    """
    pending: dict[Future[Reply], int] = {}
    source = enumerate(conversations)
    with open_client(endpoint) as client, ThreadPoolExecutor(endpoint.concurrency) as pool:
        try:
            while True:
                while len(pending) < 2 * endpoint.concurrency and (following := next(source, None)) is not None:
                    index, messages = following
                    settings = sampling if seeds is None else {**sampling, "seed": seeds[index]}
                    pending[pool.submit(complete_chat, endpoint, client, messages, **settings)] = index
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        finally:
            for future in pending:
                future.cancel()
