"""Chat completions from any OpenAI-compatible endpoint: retries, concurrency, no streaming.

endpoint = Endpoint("http://127.0.0.1:8000/v1", "suwen")
for index, reply in complete_chats(endpoint, conversations, max_tokens=256, temperature=0):
    ...
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from suwen.formats import THINKING

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
    def url(self) -> str:
        base = self.base_url.rstrip("/")
        return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"


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


def complete_chat(endpoint: Endpoint, client: httpx.Client, messages: Sequence[dict], **sampling: Any) -> Reply:
    """Ask once, again where that may help: lost connections, timeouts, full servers (Retry-After is kept to).

    Raises:
        EndpointError: refused for good, no answer after all retries, or an answer of another shape.
    """
    body = {"model": endpoint.model, "messages": list(messages), **sampling}
    pause, problem = endpoint.first_wait, ""
    for attempt in range(endpoint.retries + 1):
        if attempt:
            time.sleep(min(LONGEST_WAIT, pause))
            pause = endpoint.first_wait * 2**attempt * random.uniform(0.75, 1.25)  # not all threads at once
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
