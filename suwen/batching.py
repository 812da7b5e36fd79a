"""Answers to many people at once: requests join and leave the running batch between two tokens.

Iteration-level scheduling (Orca, Yu et al. 2022): a request waits for the next token of the others, not for their last.
Each row has its own settings and random stream, so it gets the tokens that `generation.generate_batch` gives it alone.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from suwen.generation import Draw, answer_limit, model_window
from suwen.generation_settings import GenerationSettings
from suwen.switching import active

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
PREFILL_TOKENS = 8192  # padding included, of requests that join together
# Seconds in which those who wait for a first token get it before the next step takes the processor and the interpreter
HANDOVER = 5e-4

# What a request hears: a token id, None at the end, or what went wrong.
Deliver = Callable[[int | None | Exception], None]


class Busy(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The server is shutting down."""


@dataclass(eq=False)
class Request:
    prompt: list[int]
    settings: GenerationSettings
    stop_ids: frozenset[int]
    adapter: tuple[str, ...]
    deliver: Deliver
    limit: int = 0  # tokens of the answer, at most
    cancelled: bool = False
    count: int = 0  # tokens given so far
    last_token: int = 0
    draw: Draw | None = None  # None: the likeliest token each time

    def cancel(self) -> None:
        """Leave the batch before its next token; nothing more is delivered after at most one."""
        self.cancelled = True


@dataclass
class Group:
    """Requests that decode together, on one adapter.

    Attributes:
        mask: (B, T) 1 on tokens that the cache holds, 0 on the padding at the left.
        last: (B, 1) the newest token of each, not in the cache yet.
    """

    rows: list[Request | None] = field(default_factory=list)  # None: ended, where rows cannot leave one by one
    cache: Any = None
    mask: Tensor | None = None
    last: Tensor | None = None


class Batcher:
    """A thread that decodes what is submitted; `close` ends it.

    Args:
        model: may be a PeftModel; a request names those of its adapters that answer it, none for the base alone.
        max_batch: requests that decode together, over all adapters.
        max_waiting: requests that wait for a place; more are refused.
    """

    def __init__(self, model: Any, max_batch: int = 8, max_waiting: int = 64) -> None:
        self.model, self.max_batch, self.max_waiting = model, max_batch, max_waiting
        self.window = model_window(model)
        layers = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
        # Recurrent layers keep one state a row, which cannot be padded: there, batches begin and end together.
        self.joins = set(layers) <= ATTENTION_LAYERS
        self.groups: dict[tuple[str, ...], Group] = {}
        self.waiting: deque[Request] = deque()
        self.working: list[Request] = []  # chosen, and not ended
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="batching", daemon=True)
        self.thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        stop_ids: Sequence[int],
        deliver: Deliver,
        adapter: tuple[str, ...] = (),
    ) -> Request:
        """Queue a prompt. `deliver` is called from the batching thread and must not block.

        Raises:
            ValueError: the prompt leaves no room in the model's window.
            Busy: too many wait.
        """
        request = Request(list(prompt), settings, frozenset(stop_ids), adapter, deliver)
        request.limit = answer_limit(settings, len(request.prompt), self.window)
        if settings.temperature > 0 or settings.repetition_penalty != 1:
            seed = settings.seed if settings.seed is not None else random.SystemRandom().getrandbits(63)
            ids = torch.tensor([request.prompt], device=self.model.device)
            request.draw = Draw(settings, ids, torch.ones_like(ids), [seed])
        with self.changed:
            if self.closed:
                raise Closed
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
            if len(self.waiting) >= self.max_waiting:
                raise Busy(f"{len(self.waiting)} requests wait already")
            self.waiting.append(request)
            self.changed.notify()
        return request

    def load(self) -> tuple[int, int]:
        """Requests that decode, and that wait."""
        with self.changed:
            return sum(not r.cancelled for r in self.working), sum(not r.cancelled for r in self.waiting)

    def close(self, patience: float = 0.0) -> None:
        """Take no more requests; give those at work `patience` seconds, then end them with an error."""
        with self.changed:
            self.closed = True
            self.changed.notify()
            self.changed.wait_for(lambda: not self.waiting and not self.working, patience)
            for request in [*self.waiting, *self.working]:
                if not request.cancelled:
                    request.cancel()
                    request.deliver(Closed())
            self.changed.notify()
        self.thread.join(timeout=60)

    # The batching thread

    def _run(self) -> None:
        while True:
            with self.changed:
                self.waiting = deque(r for r in self.waiting if not r.cancelled)
                self.changed.wait_for(lambda: self.waiting or self.groups or self.closed)
                if self.closed and not self.waiting and not self.groups:
                    return
                joining = self._choose()
            for adapter, requests in joining.items():
                self._guard(adapter, requests, partial(self._join, adapter, requests))
            if joining:
                time.sleep(HANDOVER)
            for adapter, group in list(self.groups.items()):
                if group.rows:
                    self._guard(adapter, [], partial(self._step, adapter))
            with self.changed:
                self.groups = {adapter: group for adapter, group in self.groups.items() if any(group.rows)}
                self.working = [request for request in self.working if not request.cancelled]
                self.changed.notify_all()

    def _choose(self) -> dict[tuple[str, ...], list[Request]]:
        """Take waiting requests, in their order, as far as there are places; by adapter."""
        joining: dict[tuple[str, ...], list[Request]] = {}
        places = self.max_batch - len(self.working)
        kept: deque[Request] = deque()
        longest: dict[tuple[str, ...], int] = {}
        for request in self.waiting:
            group = joining.get(request.adapter, [])
            length = max(longest.get(request.adapter, 0), len(request.prompt))
            fits = not group or length * (len(group) + 1) <= PREFILL_TOKENS
            if places > 0 and fits and (self.joins or request.adapter not in self.groups):
                joining.setdefault(request.adapter, []).append(request)
                longest[request.adapter] = length
                self.working.append(request)
                places -= 1
            else:
                kept.append(request)
        self.waiting = kept
        for adapter in joining:
            self.groups.setdefault(adapter, Group())
        return joining

    def _guard(self, adapter: tuple[str, ...], joining: list[Request], work: Callable[[], None]) -> None:
        """An error of the model ends the requests it belongs to, and not the server."""
        try:
            with torch.inference_mode(), active(self.model, adapter):
                work()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = RuntimeError("out of GPU memory")
            group = self.groups[adapter]
            # Those that were at work go on, unless the error came while their caches were being joined
            if not joining or any(len(layer.keys) != len(group.rows) for layer in group.cache.layers if group.rows):
                joining = [*joining, *(row for row in group.rows if row is not None and row not in joining)]
                self.groups[adapter] = Group()
            for request in joining:
                request.cancel()
                request.deliver(error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _join(self, adapter: tuple[str, ...], requests: list[Request]) -> None:
        """Read the prompts of new requests, give each its first token, and add them to the batch of their adapter."""
        requests = [request for request in requests if not request.cancelled]
        if not requests:
            return
        length = max(len(request.prompt) for request in requests)
        ids = torch.tensor([[0] * (length - len(r.prompt)) + r.prompt for r in requests], device=self.model.device)
        mask = torch.tensor(
            [[0] * (length - len(r.prompt)) + [1] * len(r.prompt) for r in requests], device=self.model.device
        )
        cache = DynamicCache() if self.joins else DynamicCache(config=self.model.config)
        logits, cache = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp_(min=0), cache)
        tokens = self._emit(requests, logits)
        group = self.groups[adapter]
        if not group.rows:
            group.rows, group.cache, group.mask, group.last = list(requests), cache, mask, tokens
        else:
            _merge_caches(group.cache, cache)
            assert group.mask is not None and group.last is not None
            width = max(group.mask.shape[1], length)
            group.mask = torch.cat([_pad_left(m, width) for m in (group.mask, mask)])
            group.last = torch.cat([group.last, tokens])
            group.rows += requests
        self._leave(group)

    def _step(self, adapter: tuple[str, ...]) -> None:
        """One more token for every request of a group."""
        group = self.groups[adapter]
        self._leave(group)
        if not any(group.rows):
            return
        assert group.mask is not None
        group.mask = torch.cat([group.mask, group.mask.new_ones(len(group.rows), 1)], dim=1)
        positions = group.mask.sum(-1, keepdim=True) - 1
        logits, group.cache = self._forward(group.last, group.mask, positions, group.cache)
        group.last = self._emit(group.rows, logits)
        self._leave(group)

    def _forward(self, ids: Any, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float(), output.past_key_values

    def _emit(self, rows: Sequence[Request | None], logits: Tensor) -> Tensor:
        """Choose the next token of each row, (B, V) -> (B, 1), and deliver it."""
        tokens = logits.argmax(-1)
        for number, row in enumerate(rows):
            if row is not None and row.draw is not None:
                before = torch.tensor([[row.last_token]], device=logits.device)
                tokens[number] = row.draw(before, logits[number : number + 1]).argmax(-1)[0]
        for number, token in enumerate(tokens.tolist()):
            row = rows[number]
            if row is None or row.cancelled:
                continue
            row.count, row.last_token = row.count + 1, token
            row.deliver(token)
            if token in row.stop_ids or row.count >= row.limit:
                row.cancelled = True
                row.deliver(None)
        return tokens[:, None]

    def _leave(self, group: Group) -> None:
        """Remove the requests that ended, and the padding that only they needed."""
        staying = [number for number, row in enumerate(group.rows) if row is not None and not row.cancelled]
        if len(staying) == len(group.rows):
            return
        if not staying:
            group.rows = []
            group.cache = group.mask = group.last = None
        elif not self.joins:
            group.rows = [row if number in staying else None for number, row in enumerate(group.rows)]
        else:
            assert group.mask is not None and group.last is not None
            chosen = torch.tensor(staying, device=group.mask.device)
            mask = group.mask[chosen]
            padding = int(mask.argmax(-1).min())
            group.mask, group.last = mask[:, padding:], group.last[chosen]
            for layer in group.cache.layers:
                layer.keys = layer.keys[chosen, :, padding:]
                layer.values = layer.values[chosen, :, padding:]
            group.rows = [group.rows[number] for number in staying]


def _pad_left(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0))


def _merge_caches(cache: Any, new: Any) -> None:
    """Append the rows of `new`, both padded on the left to the longer one; (B, H, T, D) a layer."""
    for layer, other in zip(cache.layers, new.layers, strict=True):
        width = max(layer.keys.shape[-2], other.keys.shape[-2])

        def widened(part: Tensor, width: int = width) -> Tensor:
            return torch.nn.functional.pad(part, (0, 0, width - part.shape[-2], 0))

        layer.keys = torch.cat([widened(layer.keys), widened(other.keys)])
        layer.values = torch.cat([widened(layer.values), widened(other.values)])


def collect(batcher: Batcher, prompt: Sequence[int], settings: GenerationSettings, stop_ids: Sequence[int], **options):
    """Wait for the whole answer of one prompt; its token ids."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    batcher.submit(prompt, settings, stop_ids, answers.put, **options)
    ids: list[int] = []
    while (item := answers.get()) is not None:
        if isinstance(item, Exception):
            raise item
        ids.append(item)
    return ids
