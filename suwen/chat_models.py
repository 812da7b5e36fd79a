"""What answers behind the page: models of this machine, or names at an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suwen.client import Endpoint, list_models, open_client, sampling, stream_chat
from suwen.generation_settings import GenerationSettings
from suwen.retrieval.grounding import NOT_FOUND, find_passages, with_passages

if TYPE_CHECKING:
    from suwen.batching import Batcher
    from suwen.encoding import ChatEncoder
    from suwen.retrieval.search import Hit, KnowledgeBase
    from suwen.serving import Served

ANSWER_SECONDS = 300.0
WAITING = 32
Pieces = Generator[tuple[str, str], None, None]  # ("reasoning" or "content", text)


@dataclass
class Reply:
    """An answer on its way. Closing `pieces` stops the model."""

    pieces: Pieces
    hits: tuple[Hit, ...] = ()
    abstained: bool = False
    dropped: int = 0  # tokens of old turns that no longer fit
    tokens: int = 0  # generated so far
    prompt_ids: list[int] = field(default_factory=list)  # empty for an endpoint
    prompt: str = ""  # the same as text


Ask = Callable[[list[dict], GenerationSettings, "KnowledgeBase | None"], Reply]


@dataclass(frozen=True)
class ChatModel:
    name: str
    fingerprint: dict[str, Any]  # what exports and votes say of it
    ask: Ask
    close: Callable[[], None] = lambda: None


def load_chat_models(args: argparse.Namespace) -> dict[str, ChatModel]:
    """Everything that the flags name, by the name that people choose; the first is the default."""
    if args.api_base:
        return endpoint_models(Endpoint(args.api_base, args.model or "(any)", timeout=ANSWER_SECONDS), args.model)
    from suwen.batching import Batcher
    from suwen.lineage import weights_fingerprint
    from suwen.serving import load_served, load_switchable

    served = load_switchable(args)
    batcher = Batcher(served.model, args.max_batch_size, WAITING)
    base = Path(served.base).name
    found = {base: local_model(base, batcher, served.encoder, (), {"weights": weights_fingerprint(served.base)})}
    for name, folder in served.folders.items():
        fingerprint = {"base": found[base].fingerprint["weights"], "weights": weights_fingerprint(folder)}
        _add(found, local_model(name, batcher, served.encoders[name], served.chains[name], fingerprint))
    for word in args.compare_models or ():
        name, _, folder = word.rpartition("=")
        other = load_served(argparse.Namespace(**{**vars(args), "base_model": folder, "lora_model": None}))
        name = name or Path(folder).resolve().name
        worker = Batcher(other.model, args.max_batch_size, WAITING)
        _add(found, local_model(name, worker, other.encoder, (), {"weights": weights_fingerprint(folder)}))
    # An adapter that was asked for answers unless another is chosen; its base is there to compare with
    first = next(iter(served.folders), base)
    return {first: found.pop(first), **found}


def _add(found: dict[str, ChatModel], model: ChatModel) -> None:
    if model.name in found:
        raise ValueError(f"--lora_model, --compare_models: two models are called {model.name}; give NAME=FOLDER")
    found[model.name] = model


def local_model(
    name: str, batcher: Batcher, encoder: ChatEncoder, adapter: tuple[str, ...], fingerprint: dict[str, Any]
) -> ChatModel:
    """A model of this machine; people who ask at the same time share its batch, not their words."""
    from suwen.retrieval.grounding import prepare

    preparing = threading.Lock()  # a tokenizer is not made for several threads

    def ask(messages: list[dict], settings: GenerationSettings, knowledge: KnowledgeBase | None) -> Reply:
        with preparing:
            prepared = prepare(encoder, messages, batcher.window, settings.max_new_tokens, knowledge)
        if prepared.abstained:
            return Reply(not_found(), abstained=True)
        reply = Reply(not_found(), prepared.hits, dropped=prepared.dropped, prompt_ids=prepared.ids)
        reply.pieces = batched_pieces(batcher, encoder, reply, settings, adapter)
        return reply

    return ChatModel(name, {"name": name, **fingerprint}, ask, batcher.close)


def alone(served: Served) -> Ask:
    """One person and one model, as in a terminal."""
    from suwen.generation import stream
    from suwen.retrieval.grounding import prepare

    def ask(messages: list[dict], settings: GenerationSettings, knowledge: KnowledgeBase | None) -> Reply:
        prepared = prepare(served.encoder, messages, served.window, settings.max_new_tokens, knowledge)
        if prepared.abstained:
            return Reply(not_found(), abstained=True)
        pieces: Any = stream(served.model, served.encoder, prepared.ids, settings)
        text = served.encoder.tokenizer.decode(prepared.ids)
        return Reply(pieces, prepared.hits, False, prepared.dropped, prompt_ids=prepared.ids, prompt=str(text))

    return ask


def not_found() -> Pieces:
    yield "content", NOT_FOUND


def batched_pieces(
    batcher: Batcher, encoder: ChatEncoder, reply: Reply, settings: GenerationSettings, adapter: tuple[str, ...]
) -> Pieces:
    """Raises TimeoutError past ANSWER_SECONDS, Busy where too many wait, and what the model raises."""
    from suwen.generation import AnswerDecoder

    items: queue.SimpleQueue[int | None | Exception] = queue.SimpleQueue()
    decoder = AnswerDecoder(encoder, reply.prompt_ids)
    deadline = time.monotonic() + ANSWER_SECONDS
    request = batcher.submit(reply.prompt_ids, settings, encoder.stop_token_ids, items.put, adapter)
    try:
        while True:
            try:
                item = items.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if isinstance(item, Exception):
                raise item
            if item is None:
                yield from decoder.finish()
                return
            reply.tokens += 1
            yield from decoder.push(item)
    finally:
        request.cancel()


def endpoint_models(endpoint: Endpoint, names: str | None) -> dict[str, ChatModel]:
    """The models that an endpoint lists, or those of `names` ("a,b"), each asked by its name."""
    chosen = [name for part in names.split(",") if (name := part.strip())] if names else list_models(endpoint)
    return {name: endpoint_model(Endpoint(endpoint.base_url, name, timeout=endpoint.timeout)) for name in chosen}


def endpoint_model(endpoint: Endpoint) -> ChatModel:
    client = open_client(endpoint)

    def ask(messages: list[dict], settings: GenerationSettings, knowledge: KnowledgeBase | None) -> Reply:
        hits = tuple(find_passages(knowledge, messages)) if knowledge is not None else ()
        if knowledge is not None and not hits:
            return Reply(not_found(), abstained=True)
        if hits:
            messages = with_passages(messages, [hit.passage for hit in hits])
        reply = Reply(not_found(), hits)
        reply.pieces = pieces(reply, messages, settings)
        return reply

    def pieces(reply: Reply, messages: list[dict], settings: GenerationSettings) -> Pieces:
        deadline = time.monotonic() + ANSWER_SECONDS
        counted: list[int] = []
        stream = stream_chat(endpoint, client, messages, counted.append, **sampling(settings))
        try:
            for kind, text in stream:
                reply.tokens += 1  # until the endpoint has counted: a part is a token, mostly
                yield kind, text
                if time.monotonic() > deadline:
                    raise TimeoutError
            reply.tokens = counted[-1] if counted else reply.tokens
        finally:
            stream.close()

    return ChatModel(endpoint.model, {"name": endpoint.model, "endpoint": endpoint.base_url}, ask, client.close)
