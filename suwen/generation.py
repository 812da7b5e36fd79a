"""Answers of a model: whole batches, or one that streams; shared by the terminal, the page and the evaluation.

Prompts are token ids from `ChatEncoder.encode_prompt`, so what is served is what was trained. The logits are shaped
and drawn here instead of by the library's own flags, for three promises that those do not keep: settings in a model's
generation_config.json never leak in, padding never counts as repeated text, and each prompt has its own random stream
(with the same seed it gets the same answer alone, in any batch, and after a resume).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from suwen.encoding import ChatEncoder
from suwen.generation_settings import GenerationSettings

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Answer:
    content: str
    reasoning: str  # the thinking part, "" where there is none
    token_ids: list[int]  # as generated, with the stop token if it came
    finish_reason: Literal["stop", "length"]


class Piece(NamedTuple):
    """A part of a streamed answer."""

    kind: Literal["reasoning", "content"]
    text: str


def window_of(config: Any) -> int | None:
    """Tokens that a model can look back on, None where its config names no limit.

    Dynamically stretched positions keep the model's own window in the config, where the stretching begins.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    rope = getattr(text, "rope_parameters", None) or {}
    return int(window * rope["factor"]) if window and rope.get("rope_type") == "dynamic" else window


def model_window(model) -> int | None:
    """Tokens that a model can look back on, None where its configuration names no limit."""
    return window_of(model.config)


def fit_prompt(
    encoder: ChatEncoder,
    messages: list[dict],
    window: int | None,
    max_new_tokens: int,
    thinking: bool | None = None,
) -> tuple[list[int], int]:
    """Encode a prompt so that an answer still fits into the model's window, without its oldest turns if need be.

    Half of the window is kept for the answer at most, `max_new_tokens` if that is less.

    Returns:
        the ids, and how many tokens of old turns were left out.

    Raises:
        ValueError: the last question alone is too long.
    """
    ids = encoder.encode_prompt(messages, thinking=thinking)
    room = window - min(max_new_tokens, window // 2) if window else None
    if room is None or len(ids) <= room:
        return ids, 0
    # The last question with the system prompt must fit by itself; turns are dropped, never parts of them.
    last = [m for m in messages[:1] if m["role"] == "system"] + messages[-1:]
    shortest = len(encoder.encode_prompt(last, thinking=thinking))
    if shortest > room:
        raise ValueError(
            f"the question has {shortest} tokens, expected at most {room}: the model's window of {window} less what is"
            f" kept for the answer (--max_new_tokens {max_new_tokens})"
        )
    fitted = encoder.encode_prompt(messages, thinking=thinking, max_length=room)
    return fitted, len(ids) - len(fitted)


class AnswerDecoder:
    """Turn the tokens of one answer into text as they come: thinking part and answer apart, no special token in either.

    A character whose bytes are spread over tokens is held back until it is whole; the pieces join to the same text
    that decoding all tokens at once gives, less the white space around each part.
    """

    def __init__(self, encoder: ChatEncoder, prompt_ids: Sequence[int]) -> None:
        self.tokenizer = encoder.tokenizer
        self.hidden = _hidden_ids(encoder)
        self.ids: list[int] = []
        self.settled = 0  # ids whose text has been given out
        self.context = 0  # first id that the text of the next ones may depend on (leading spaces of SentencePiece)
        self.waiting = ""  # decoded, but perhaps the beginning of a marker
        # Templates of pure thinking models open the thinking part in the prompt.
        inside = self._decode(list(prompt_ids[-8:])).rstrip().endswith(THINK_OPEN)
        self.state: Literal["start", "reasoning", "content"] = "reasoning" if inside else "start"
        self.spaces: str | None = None  # white space not yet given out; None: nothing before it, so it is not needed

    def push(self, token_id: int) -> list[Piece]:
        if token_id in self.hidden:
            return []
        self.ids.append(token_id)
        before = self._decode(self.ids[self.context : self.settled])
        now = self._decode(self.ids[self.context :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return []
        self.context, self.settled = self.settled, len(self.ids)
        return self._sort(now[len(before) :])

    def finish(self) -> list[Piece]:
        """What is still held back; half a character at the end is dropped."""
        before = self._decode(self.ids[self.context : self.settled])
        rest = self._decode(self.ids[self.context :])[len(before) :].rstrip("\ufffd")
        self.settled = self.context = len(self.ids)
        pieces = self._sort(rest)
        waiting, self.waiting = self.waiting, ""
        return pieces + self._give(waiting)

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _sort(self, text: str) -> list[Piece]:
        self.waiting += text
        pieces: list[Piece] = []
        if self.state == "start":
            begin = self.waiting.lstrip()
            if THINK_OPEN.startswith(begin):  # "" too
                return pieces
            if begin.startswith(THINK_OPEN):
                self.state, self.waiting = "reasoning", begin.removeprefix(THINK_OPEN)
            else:
                self.state = "content"
        if self.state == "reasoning":
            inner, closed, rest = self.waiting.partition(THINK_CLOSE)
            if not closed:
                held = next((n for n in range(len(THINK_CLOSE) - 1, 0, -1) if inner.endswith(THINK_CLOSE[:n])), 0)
                self.waiting = inner[len(inner) - held :]
                return self._give(inner[: len(inner) - held])
            pieces = self._give(inner)
            self.state, self.waiting, self.spaces = "content", rest, None
        text, self.waiting = self.waiting, ""
        return pieces + self._give(text)

    def _give(self, text: str) -> list[Piece]:
        if self.spaces is None:
            text = text.lstrip()
        text = (self.spaces or "") + text
        body = text.rstrip()
        if not body:
            self.spaces = text if self.spaces is not None else None
            return []
        self.spaces = text[len(body) :]
        return [Piece("reasoning" if self.state == "reasoning" else "content", body)]


def _hidden_ids(encoder: ChatEncoder) -> set[int]:
    """Ids that never show in an answer: special tokens and stop tokens, but not the markers of the thinking part."""
    tokenizer = encoder.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return (special - set(tokenizer.convert_tokens_to_ids([THINK_OPEN, THINK_CLOSE]))) | set(encoder.stop_token_ids)


class Draw(LogitsProcessor):
    """Shape the logits and leave one token a row; the row's own random stream chooses it."""

    def __init__(self, settings: GenerationSettings, prompt: Tensor, mask: Tensor, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.prompt, self.mask = prompt, mask  # (B, T), mask 0 on padding
        self.streams = [random.Random(seed) for seed in seeds]
        self.seen: Tensor | None = None  # (B, V) tokens that stand in the prompt or the answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        settings = self.settings
        if settings.repetition_penalty != 1:
            # Keskar et al. 2019 (arXiv:1909.05858), section 4.1, with the sign rule of today's libraries.
            if self.seen is None:
                counts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
                self.seen = counts.scatter_add(1, self.prompt, self.mask.to(torch.int32)) > 0
            else:
                self.seen.scatter_(1, input_ids[:, -1:], True)
            penalised = torch.where(
                scores < 0, scores * settings.repetition_penalty, scores / settings.repetition_penalty
            )
            scores = torch.where(self.seen, penalised, scores)
        if settings.temperature == 0:
            return scores
        scores = scores / settings.temperature
        if settings.top_k:
            scores = TopKLogitsWarper(top_k=settings.top_k)(input_ids, scores)
        if settings.top_p < 1:
            scores = TopPLogitsWarper(top_p=settings.top_p)(input_ids, scores)
        # Inverse of the distribution function: one number a row, whatever the batch and the device.
        sums = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        draws = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64, device=scores.device)
        chosen = torch.searchsorted(sums, draws * sums[:, -1:], right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Stop(StoppingCriteria):
    """Stop each row at its own length, and all of them when asked to."""

    def __init__(self, prompt_length: int, limits: Tensor, event: threading.Event | None = None) -> None:
        self.prompt_length, self.limits, self.event = prompt_length, limits, event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:  # -> (B,) bool
        if self.event is not None and self.event.is_set():
            return torch.ones_like(self.limits, dtype=torch.bool)
        return self.limits <= input_ids.shape[1] - self.prompt_length


class _IdStream(BaseStreamer):
    """Hand the new ids of one row to another thread."""

    def __init__(self, queue: SimpleQueue) -> None:
        self.queue, self.prompt_seen = queue, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token_id in value.flatten().tolist():
                self.queue.put(token_id)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def answer_limit(settings: GenerationSettings, prompt_length: int, window: int | None) -> int:
    if window is not None and prompt_length >= window:
        raise ValueError(f"a prompt of {prompt_length} tokens leaves no room in the model's window of {window}")
    return min(settings.max_new_tokens, window - prompt_length) if window else settings.max_new_tokens


def _generate(
    model,
    encoder: ChatEncoder,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seeds: Sequence[int],
    limits: Sequence[int],
    streamer: BaseStreamer | None = None,
    event: threading.Event | None = None,
) -> Tensor:
    """Left-padded batch through the library's decoding loop, which knows every architecture's cache; (B, new) ids."""
    pad = encoder.tokenizer.pad_token_id
    pad = pad if pad is not None else encoder.stop_token_ids[0]
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=max(limits),
        eos_token_id=list(encoder.stop_token_ids),
        pad_token_id=pad,
        do_sample=False,  # Draw draws
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([Draw(settings, ids, mask, seeds)]),
            stopping_criteria=StoppingCriteriaList([_Stop(length, torch.tensor(limits, device=model.device), event)]),
            streamer=streamer,
        )
    return output[:, length:]


def _row_seeds(settings: GenerationSettings, seeds: Sequence[int] | None, count: int) -> Sequence[int]:
    if seeds is not None:
        return seeds
    if settings.seed is None:
        return [random.SystemRandom().getrandbits(63) for _ in range(count)]
    return [settings.seed + row for row in range(count)]


def generate_batch(
    model,
    encoder: ChatEncoder,
    prompts_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer several prompts at once.

    Args:
        prompts_ids: ids from `ChatEncoder.encode_prompt` or `fit_prompt`, of any lengths.
        seeds: one for each prompt; default `settings.seed` plus its place in the batch.

    Returns:
        The answers in the order of the prompts; each as long as if it had been alone.

    Raises:
        ValueError: a prompt leaves no room in the model's window.
    """
    if not prompts_ids:
        return []
    limits = [answer_limit(settings, len(prompt), model_window(model)) for prompt in prompts_ids]
    output = _generate(
        model, encoder, prompts_ids, settings, _row_seeds(settings, seeds, len(prompts_ids)), limits
    ).tolist()
    stops = set(encoder.stop_token_ids)
    answers = []
    for prompt, row, limit in zip(prompts_ids, output, limits, strict=True):
        end = next((place + 1 for place, token_id in enumerate(row) if token_id in stops), limit)
        answers.append(decode_answer(encoder, prompt, row[: min(end, limit)]))
    return answers


def generate_many(
    model,
    encoder: ChatEncoder,
    prompts: Mapping[int, Sequence[int]],
    settings: GenerationSettings,
    batch_size: int,
    notice: Callable[[str], None] = lambda line: None,
    seeds: Mapping[int, int] | Sequence[int] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer any number of prompts in batches of like length, the longest first; yields (its key, answer).

    The longest first shows at once whether a batch fits into memory; one that does not is halved. What is drawn hangs
    on the key of a prompt alone, not on the batch it falls into.

    Args:
        seeds: by key; default `settings.seed` plus the key.

    Raises:
        ValueError: a prompt does not fit into memory, even alone.
    """
    order = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    size = batch_size
    while order:
        batch = order[:size]
        chosen = [seeds[key] for key in batch] if seeds is not None else None
        if chosen is None and settings.seed is not None:
            chosen = [settings.seed + key for key in batch]
        try:
            answers = generate_batch(model, encoder, [prompts[key] for key in batch], settings, chosen)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                tokens = len(prompts[batch[0]])
                raise ValueError(f"a prompt of {tokens} tokens does not fit into memory, even alone") from None
            size = len(batch) // 2
            torch.cuda.empty_cache()
            notice(f"note: {len(batch)} prompts at once do not fit into memory; going on with {size}")
            continue
        order = order[size:]
        yield from zip(batch, answers, strict=True)


def decode_answer(encoder: ChatEncoder, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Answer:
    decoder = AnswerDecoder(encoder, prompt_ids)
    pieces = [piece for token_id in answer_ids for piece in decoder.push(token_id)] + decoder.finish()
    texts = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")}
    stopped = bool(answer_ids) and answer_ids[-1] in encoder.stop_token_ids
    return Answer(texts["content"], texts["reasoning"], list(answer_ids), "stop" if stopped else "length")


def stream(
    model,
    encoder: ChatEncoder,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
) -> Generator[Piece, None, None]:
    """Answer one prompt piece by piece; the pieces join to what `generate_batch` gives with the same seed.

    Closing the iterator (or an exception at the place that consumes it, such as Ctrl-C) stops the model after the
    token it is at.

    Raises:
        ValueError: the prompt leaves no room in the model's window. Errors of the model are passed on.
    """
    limit = answer_limit(settings, len(prompt_ids), model_window(model))
    return _stream(model, encoder, prompt_ids, settings, limit)


def _stream(model, encoder, prompt_ids, settings, limit) -> Generator[Piece, None, None]:
    queue: SimpleQueue = SimpleQueue()
    event = threading.Event()

    def work() -> None:
        try:
            seeds = _row_seeds(settings, None, 1)
            _generate(model, encoder, [prompt_ids], settings, seeds, [limit], _IdStream(queue), event)
            queue.put(None)
        except BaseException as error:  # whatever it is belongs to the consumer
            queue.put(error)

    decoder = AnswerDecoder(encoder, prompt_ids)
    worker = threading.Thread(target=work, name="generation", daemon=True)
    worker.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from decoder.push(item)
        yield from decoder.finish()
    finally:
        event.set()
        worker.join()
