"""Conversations and documents to token ids and labels: one encoder for training, evaluation and serving.

Text is rendered by the tokenizer's own Jinja chat template and by nothing else; the template alone decides which
special tokens there are. Every trained answer stands behind the ids of the prompt exactly as it is served, so that

    encode_prompt(messages before the answer) + ids of the answer = ids trained

for every template, including those that rewrite the history (Qwen3 and others drop old thinking: such a conversation
becomes one row per affected turn, and each answer is trained once).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from suwen.byte_pairs import fast_copy
from template import TEMPLATES, get_template

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy leaves out

# Reasons under which encode_conversation counts what it left out
ANSWER_TOO_LONG = "answer longer than max_length"
PROMPT_TOO_LONG = "prompt and answer longer than max_length"
HISTORY_SHORTENED = "oldest turns left out of a prompt longer than max_length"
NO_ANSWER = "question without an answer"
THINKING_LEFT_OUT = "thinking left out of an answer, as the template or --thinking asks"

INLINE_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
OPEN_THINKING = re.compile(r"<think>\s*\Z")
CLOSED_THINKING = re.compile(r"</think>\s*\Z")
# Words no tokenizer or template gives a meaning to, to find out where a template puts things
PROBE_QUESTION, PROBE_ANSWER, PROBE_REASONING = "probequestion", "probeanswer", "probereasoning"


class Turn(NamedTuple):
    """One answer and the prompt it is given to; `text` is what both spell, sentinels included."""

    prompt_ids: list[int]
    answer_ids: list[int]
    text: str

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def apply_template(tokenizer: PreTrainedTokenizerBase, template_name: str) -> None:
    """Set the chat template of `tokenizer`: a named one, or with "auto" the one it came with.

    Raises:
        ValueError: "auto" and there is none; unknown name; control tokens of the template are not in the vocabulary.
    """
    if template_name == "auto":
        if not tokenizer.chat_template:
            raise ValueError(
                f"--template_name auto: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template "
                f"of its own; choose one of {', '.join(sorted(TEMPLATES))}"
            )
        return
    template = get_template(template_name)
    missing = [token for token in template.special_tokens if not is_single_token(tokenizer, token)]
    missing += [
        name for name in ("bos_token", "eos_token") if name in template.jinja and getattr(tokenizer, name) is None
    ]
    if missing:
        raise ValueError(
            f"--template_name {template_name}: the tokenizer of {tokenizer.name_or_path or 'this model'} does not hold "
            f"{', '.join(missing)} as single tokens, expected a model of that family or another template"
        )
    tokenizer.chat_template = template.jinja


def is_single_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    [ids] = token_ids(tokenizer, [token])
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == token


class ChatEncoder:
    """Messages to token ids by the tokenizer's chat template.

    Args:
        tokenizer: its chat_template must be set.
        thinking: True or False to ask every prompt for an answer with or without thinking, where the template has such
            a switch (False also leaves out the thinking in the data); None to train each answer as it is, with
            thinking if it has some, and to serve by the template's own default. Becomes False for templates whose
            prompts rule thinking out.

    Attributes:
        stop_token: text of the token that ends an assistant turn.
        stop_token_ids: ids at which generation stops: that token and the tokenizer's EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, expected one: choose it with --template_name")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._source = tokenizer.get_chat_template()
        self._special_tokens = tokenizer.special_tokens_map
        self._switches = thinking_switches(self._source)
        self._control = control_pattern(tokenizer, len(tokenizer))
        self._anchors = continuation_anchors(tokenizer)
        question = [{"role": "user", "content": PROBE_QUESTION}]
        if CLOSED_THINKING.search(self._render(question, True, True)):
            # The template opens every answer with closed thinking, also when asked to think
            if thinking:
                raise ValueError("--thinking on: the chat template only asks for answers without thinking")
            self.thinking = False
        self._reasoning_key = self._find_reasoning_key()
        # How thinking is written for templates that do not render it themselves
        self._think_tags = ("<think>\n", "\n</think>\n\n")
        if "<|channel>" in self._source:  # Gemma 4
            self._think_tags = ("<|channel>thought\n", "\n<channel|>")
        self._find_stop()

    # Rendering

    def render(self, messages: list[dict], add_generation_prompt: bool = False, thinking: bool | None = None) -> str:
        """The text of a conversation, or of a prompt, as the chat template writes it."""
        return self._render(self._prepare(messages), add_generation_prompt, thinking)

    def _render(self, messages: list[dict], add_generation_prompt: bool, thinking: bool | None) -> str:
        thinking = self.thinking if thinking is None else thinking
        switches = {} if thinking is None else dict.fromkeys(self._switches, thinking)
        if not messages:
            raise ValueError("the conversation has no message before its first answer, expected a question")
        template = compile_template(self._source)
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                **self._special_tokens | switches,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot express this conversation: {error}") from error

    def _prepare(self, messages: list[dict]) -> list[dict]:
        """Messages as the template reads them: the thinking apart from the answer, under the template's own key."""
        prepared = []
        for number, message in enumerate(messages, start=1):
            content, reasoning = message.get("content"), message.get("reasoning_content")
            if not isinstance(content, str):
                raise ValueError(f"message {number}: content is {type(content).__name__}, expected text")
            if message["role"] == "assistant" and not reasoning and "</think>" in self._source:
                # Such templates cut this part off the answer, each in its own way
                if inline := INLINE_THINKING.fullmatch(content):
                    reasoning, content = inline[1].strip("\n"), inline[2]
            kept = {"role": message["role"], "content": content}
            if reasoning and reasoning.strip() and self.thinking is not False:
                kept[self._reasoning_key or "reasoning_content"] = reasoning
            prepared.append(kept)
        return prepared

    def _protect(self, messages: list[dict]) -> tuple[list[dict], str | None]:
        """Break spelled special tokens with a sentinel, so that they stay text.

        The sentinel stands behind the first character of each, where no trimming reaches it. Returns the messages and
        the sentinel, None where there was nothing to break.
        """
        fields = [(m, key) for m in messages for key in m if key != "role" and self._control.search(m[key])]
        if not fields:
            return messages, None
        everything = self._source + "".join(m[key] for m in messages for key in m)
        sentinel = unused_character(everything)
        protected = [dict(m) for m in messages]
        for index, message in enumerate(messages):
            for key in message.keys() - {"role"}:
                protected[index][key] = break_tokens(message[key], self._control, sentinel)
        return protected, sentinel

    # Probing the template

    def _find_reasoning_key(self) -> str | None:
        """The message key under which the template renders the thinking of a final answer, None if it does not."""
        question = {"role": "user", "content": PROBE_QUESTION}
        for key in ("reasoning_content", "thinking", "reasoning"):
            answer = {"role": "assistant", "content": PROBE_ANSWER, key: PROBE_REASONING}
            if PROBE_REASONING in self._render([question, answer], False, True):
                return key
        return None

    def _find_stop(self) -> None:
        """Find what the template writes behind an answer, and the token in it that ends the turn.

        Sets `_tail`, the text behind the content at the end of a conversation, and `_stop_text`, the part of it that
        is trained: up to the stop token.
        """
        question = {"role": "user", "content": PROBE_QUESTION}
        answer = {"role": "assistant", "content": PROBE_ANSWER}
        last = self._render([question, answer], False, False)
        earlier = self._render([question, answer, question, {**answer, "content": "x"}], False, False)
        if PROBE_ANSWER not in last or PROBE_ANSWER not in earlier:
            raise ValueError(
                "the chat template does not render the text of an assistant message, expected a template for text "
                "conversations (content as a string)"
            )
        self._tail = last.rpartition(PROBE_ANSWER)[2]
        next_tail = earlier.rpartition(PROBE_ANSWER)[2]
        before, stops = special_run(self._tail, self.tokenizer)
        if stops:
            # What stands only here but not between turns (an EOS behind the whole conversation) does not end a turn
            next_before, next_stops = special_run(next_tail, self.tokenizer)
            shared = common_prefix(stops, next_stops) if before == next_before else []
            stops = shared or stops[:1]
        else:
            # The header of the next role can be the stop token: <|user|> of the GLM family
            before, stops = special_run(next_tail, self.tokenizer)
            stops = stops[:1]
            if not stops or before.strip():
                before, stops = "", [self.tokenizer.eos_token]
        if stops[-1] is None:
            raise ValueError("neither the chat template nor the tokenizer has a token that ends an answer (EOS)")
        self._stop_text = before + "".join(stops)
        self.stop_token = stops[-1]
        if not is_single_token(self.tokenizer, self.stop_token):
            raise ValueError(f"the stop token {self.stop_token!r} is not a single token of the tokenizer")
        stop_id = self.tokenizer.convert_tokens_to_ids(self.stop_token)
        self.stop_token_ids = list(dict.fromkeys(i for i in (stop_id, self.tokenizer.eos_token_id) if i is not None))
        if not self._control.search(self.stop_token):
            self._control = re.compile(f"{self._control.pattern}|{first_character(self.stop_token)}")
        # Tokenizers cut the text at special tokens first, so what comes behind one can be tokenised on its own. Where
        # this does not hold, prompts are tokenised from their start again.
        starts, rests = ("问", "a "), ("", "\n", "\n\na", " a", "答", "\n<", "  \n")
        whole = self._tokenize([start + self.stop_token + rest for start in starts for rest in rests])
        parts = [
            first + rest[1:]
            for first in self._tokenize([start + self.stop_token for start in starts])
            for rest in self._tokenize([self.stop_token + rest for rest in rests])
        ]
        self._stop_is_boundary = whole == parts

    # Tokenising

    def _tokenize(self, texts: list[str], sentinel: str | None = None) -> list[list[int]]:
        """The ids of each text, tokenised as a whole; cut only at sentinels."""
        if sentinel is None:
            return token_ids(self.tokenizer, texts)
        return tokenize_broken(self.tokenizer, texts, sentinel, self._anchors)

    def _answer_text(self, prompt: str, full: str, reasoning: str | None) -> str:
        """What the model has to say behind `prompt` for the conversation `full`, stop token included."""
        opening, closing = self._think_tags
        opened = OPEN_THINKING.search(prompt)
        unrendered = reasoning.strip("\n") if reasoning and not self._reasoning_key else ""
        if full.startswith(prompt):
            answer = full[len(prompt) :]
            if unrendered:
                answer = ("" if opened else opening) + unrendered + closing + answer
        elif opened and full.startswith(prompt[: opened.start()]):
            # The prompt opens the thinking and the template drops it from answers given: close it as the model must
            answer = full[opened.start() :]
            if empty := re.match(r"<think>\s*</think>", answer):
                answer, closing = answer[empty.end() :], closing.rstrip("\n")
            answer = unrendered + closing + answer
        else:
            raise ValueError(
                "the chat template writes a conversation that does not go on from its own generation prompt; expected "
                f"...{prompt[-40:]!r}, found ...{full[max(0, len(prompt) - 40) : len(prompt) + 20]!r}"
            )
        if not answer.endswith(self._tail):
            raise ValueError(f"the chat template ends an answer with {answer[-20:]!r}, expected {self._tail!r}")
        return answer[: len(answer) - len(self._tail)] + self._stop_text

    def _encode_turn(self, messages: list[dict], sentinel: str | None, known: tuple[str, list[int]] = ("", [])) -> Turn:
        """The last message, an answer, behind its prompt. `known`: a text that perhaps begins it, and its ids."""
        reasoning = messages[-1].get(self._reasoning_key or "reasoning_content")
        thinking = bool(reasoning) if self.thinking is None else self.thinking
        prompt = self._render(messages[:-1], True, thinking)
        answer = self._answer_text(prompt, self._render(messages, False, thinking), reasoning)
        prompt_ids, [answer_ids] = self._encode_behind(prompt, [answer], sentinel, known)
        return Turn(prompt_ids, answer_ids, prompt + answer)

    def _encode_behind(
        self, prompt: str, answers: list[str], sentinel: str | None, known: tuple[str, list[int]] = ("", [])
    ) -> tuple[list[int], list[list[int]]]:
        """The ids of a prompt, and of each answer behind it. `known`: a text that perhaps begins it, and its ids.

        The prompt up to its last stop token is tokenised once, the little behind that with each answer again.
        """
        stop = self.stop_token if self._stop_is_boundary else ""
        have, known_ids = (len(known[0]), known[1]) if stop and prompt.startswith(known[0]) else (0, [])
        at = prompt.rfind(stop, have) if stop else -1
        cut = at + len(stop) if at >= 0 else have
        leads = (stop if have else "", stop if cut else "")
        head, rest = leads[0] + prompt[have:cut], leads[1] + prompt[cut:]
        head_ids, rest_ids, *wholes = self._tokenize([head, rest, *(rest + answer for answer in answers)], sentinel)
        prompt_ids = known_ids + head_ids[bool(leads[0]) :] + rest_ids[bool(leads[1]) :]
        return prompt_ids, [
            self._ids_behind(rest_ids, whole, answer, sentinel) for whole, answer in zip(wholes, answers, strict=True)
        ]

    def _ids_behind(self, prompt_ids: list[int], all_ids: list[int], answer: str, sentinel: str | None) -> list[int]:
        """The ids of `answer` in `all_ids`, or its own where the tokenizer merges across the end of the prompt."""
        if all_ids[: len(prompt_ids)] == prompt_ids:
            return all_ids[len(prompt_ids) :]
        pieces = answer.split(sentinel) if sentinel else [answer]
        return [i for piece in pieces for i in tokenize_continuation(self.tokenizer, piece, self._anchors)]

    # What the stages call

    def encode_prompt(
        self, messages: list[dict], thinking: bool | None = None, max_length: int | None = None
    ) -> list[int]:
        """The ids of a prompt as served, generation prompt included.

        Args:
            messages: the last one is the user's.
            thinking: ask for an answer with or without thinking; None: as this encoder was built.
            max_length: in tokens; the oldest exchanges are left out of a longer prompt.

        Raises:
            ValueError: the last question alone with the system prompt is longer than max_length.
        """
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(f"the last message is from {messages[-1:] and messages[-1]['role']!r}, expected 'user'")
        messages, sentinel = self._protect(self._prepare(messages))

        def encode(start: int) -> list[int]:
            return self._tokenize([self._render(window(messages, start), True, thinking)], sentinel)[0]

        starts = exchange_starts(messages)
        ids = encode(starts[0])
        if max_length is None or len(ids) <= max_length:
            return ids
        fitting = first_fitting(starts[1:], encode, lambda ids: len(ids) <= max_length)
        if fitting is None:
            raise ValueError(f"the last question has {len(encode(starts[-1]))} tokens, expected at most {max_length}")
        return fitting[1]

    def encode_conversation(
        self, messages: list[dict], max_length: int | None, train_on_inputs: bool = False
    ) -> tuple[list[dict], Counter]:
        """Encode a conversation for training: loss on each answer and its stop token, and on nothing else.

        Turns share a row as long as the ids so far begin the prompt of the next answer as it is served. A turn that
        does not fit into max_length with its history goes into a new row that begins with a later exchange, with the
        system prompt and at most half of max_length of history, so that the turns behind it fit as well.

        Args:
            max_length: in tokens, of a row; None for no limit.
            train_on_inputs: labels everywhere.

        Returns:
            rows {"input_ids": [...], "labels": [...]} and the counts of what was left out, by reason.
        """
        counts: Counter = Counter()
        if self.thinking is False:
            counts[THINKING_LEFT_OUT] += sum(bool(message.get("reasoning_content")) for message in messages)
        messages, sentinel = self._protect(self._prepare(messages))
        if messages and messages[-1]["role"] == "user":
            counts[NO_ANSWER] += 1
        limit = max_length if max_length is not None else float("inf")
        ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
        starts = exchange_starts(messages)
        first = 0  # the exchange with which the history begins
        rows: list[dict] = []
        text = ""
        row: dict[str, list[int]] = {"input_ids": [], "labels": []}
        for number, end in enumerate(ends):

            def encode(start: int, end: int = end) -> Turn:
                return self._encode_turn(window(messages[:end], start), sentinel)

            known = (text, row["input_ids"])
            turn = self._encode_turn(window(messages[:end], starts[first]), sentinel, known)
            if turn.length > limit:
                alone = turn if first == number else encode(starts[number])
                if alone.length > limit:
                    counts[ANSWER_TOO_LONG if len(alone.answer_ids) > limit else PROMPT_TOO_LONG] += 1
                    continue
                room = min(limit, len(alone.prompt_ids) + limit // 2 + len(alone.answer_ids))
                fitting = first_fitting(starts[first + 1 : number], encode, lambda turn, room=room: turn.length <= room)
                start, turn = fitting or (starts[number], alone)
                first = starts.index(start)
                counts[HISTORY_SHORTENED] += 1
            have = len(row["input_ids"])
            if not have or turn.prompt_ids[:have] != row["input_ids"]:
                have, row = 0, {"input_ids": [], "labels": []}
                rows.append(row)
            row["labels"] += [IGNORE_INDEX] * (len(turn.prompt_ids) - have) + turn.answer_ids
            row["input_ids"] = turn.prompt_ids + turn.answer_ids
            text = turn.text
        if train_on_inputs:
            for row in rows:
                row["labels"] = list(row["input_ids"])
        return rows, +counts

    def encode_pair(
        self, prompt_messages: list[dict], chosen: list[dict] | str, rejected: list[dict] | str, max_length: int | None
    ) -> dict | None:
        """Two answers to one prompt: {"prompt_ids", "chosen_ids", "rejected_ids"}; see `encode_answers`."""
        answers = [as_answer(chosen, "chosen"), as_answer(rejected, "rejected")]
        found = self.encode_answers(prompt_messages, answers, max_length)
        if found is None:
            return None
        prompt_ids, (chosen_ids, rejected_ids) = found
        return {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}

    def encode_answers(
        self, prompt_messages: list[dict], answers: list[dict], max_length: int | None
    ) -> tuple[list[int], list[list[int]]] | None:
        """The ids of a prompt as served, and of several answers to it, each with its stop token.

        The prompt asks for thinking if one of the answers has some. The oldest exchanges are left out where prompt and
        longest answer are longer than max_length; None if they do not fit without them.
        """
        prepared, sentinel = self._protect(self._prepare([*prompt_messages, *answers]))
        messages, answers = prepared[: -len(answers)], prepared[-len(answers) :]
        reasonings = [answer.get(self._reasoning_key or "reasoning_content") for answer in answers]
        thinking = any(reasonings) if self.thinking is None else self.thinking

        def encode(start: int) -> tuple[list[int], list[list[int]]]:
            history = window(messages, start)
            prompt = self._render(history, True, thinking)
            texts = [
                self._answer_text(prompt, self._render([*history, answer], False, thinking), reasoning)
                for answer, reasoning in zip(answers, reasonings, strict=True)
            ]
            return self._encode_behind(prompt, texts, sentinel)

        def fits(encoded: tuple[list[int], list[list[int]]]) -> bool:
            prompt_ids, answer_ids = encoded
            return max_length is None or len(prompt_ids) + max(map(len, answer_ids)) <= max_length

        starts = exchange_starts(messages)
        encoded = encode(starts[0])
        if fits(encoded):
            return encoded
        fitting = first_fitting(starts[1:], encode, fits)
        return fitting[1] if fitting else None


# Windows of a conversation


def exchange_starts(messages: list[dict]) -> list[int]:
    """Where each exchange begins: behind the system prompt and behind each answer that is not the last message."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    return [first] + [i + 1 for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"]


def window(messages: list[dict], start: int) -> list[dict]:
    """The system prompt, if there is one, and the messages from `start` on."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    return messages if start <= first else messages[:first] + messages[start:]


def first_fitting(starts: list[int], encode: Any, fits: Any) -> tuple[int, Any] | None:
    """The earliest of `starts` from which the conversation fits, with its encoding. A later start is never longer."""
    found = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        encoded = encode(starts[middle])
        if fits(encoded):
            found, high = (starts[middle], encoded), middle
        else:
            low = middle + 1
    return found


def as_answer(answer: list[dict] | str, name: str) -> dict:
    if isinstance(answer, str):
        return {"role": "assistant", "content": answer}
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise ValueError(f"{name}: found roles {[m['role'] for m in answer]}, expected one assistant message")
    return answer[0]


# Special tokens and text


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text and nothing else: no BOS or EOS, no mask, no warning about the length."""
    fast = fast_copy(tokenizer)
    found = [fast.encode(text) if fast else None for text in texts]
    slow = [text for text, ids in zip(texts, found, strict=True) if ids is None]
    if not slow:
        return [ids for ids in found if ids is not None]
    rest = iter(tokenizer(slow, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    return [next(rest) if ids is None else ids for ids in found]


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """What `apply_chat_template` renders in the end; its way there takes longer than the template."""
    template = _compile_jinja_template(source)
    template.globals = dict(template.globals)  # read at every rendering, and twice as fast as a chain of dicts
    return template


def thinking_switches(source: str) -> list[str]:
    """Names of the variables by which a chat template turns thinking on and off (DeepSeek's is `thinking`)."""
    switches = ["enable_thinking"] if "enable_thinking" in source else []
    if re.search(r"(?<![.\w])thinking\s*(is\s+(not\s+)?defined|\|\s*default)", source):
        switches.append("thinking")
    return switches


@lru_cache(maxsize=8)
def control_pattern(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> re.Pattern:
    """Matches the first character of every spelled special token, also of overlapping ones."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens.update(tokenizer.all_special_tokens)
    return re.compile("|".join(map(first_character, sorted(t for t in tokens if len(t) > 1))) or r"(?!)")


def first_character(token: str) -> str:
    # Not a lookahead alone: a character to begin with is what makes the search fast, nanoseconds per character
    return f"{re.escape(token[0])}(?={re.escape(token[1:])})"


def break_tokens(text: str, pattern: re.Pattern, sentinel: str) -> str:
    """Put the sentinel behind the first character of each spelled special token."""
    return pattern.sub(rf"\g<0>{sentinel}", text)


def unused_character(text: str) -> str:
    """A private-use character that the text does not hold."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def special_run(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The first run of added tokens in `text` without anything between them, and the text before it."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    longest_first = sorted((t for t in tokens if t.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    run: list[str] = []
    first = match = pattern.search(text)
    while match:
        run.append(match[0])
        match = pattern.match(text, match.end())
    return (text[: first.start()] if first else text), run


def common_prefix(first: list[str], second: list[str]) -> list[str]:
    shared = []
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared.append(a)
    return shared


def continuation_anchors(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts behind which a piece from the middle of a text is tokenised without the space put before a beginning.

    SentencePiece tokenizers, and their legacy copies also behind every special token, begin a text with a space that
    nobody wrote. Empty for tokenizers that do not.
    """

    def tokens(text: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(token_ids(tokenizer, [text])[0]))

    begins_with_space = tokens("a")[:1] and tokens("a")[0].startswith(("▁", "Ġ"))
    return ["\n", "|", "。", "0"] if begins_with_space else []


def tokenize_continuation(tokenizer: PreTrainedTokenizerBase, piece: str, anchors: Iterable[str]) -> list[int]:
    """The ids of a piece from the middle of a text."""
    for anchor in anchors:
        anchor_ids, ids = token_ids(tokenizer, [anchor, anchor + piece])
        if anchor_ids and ids[: len(anchor_ids)] == anchor_ids:
            return ids[len(anchor_ids) :]
    return token_ids(tokenizer, [piece])[0]


def tokenize_broken(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], sentinel: str, anchors: Iterable[str]
) -> list[list[int]]:
    """The ids of texts cut at their sentinels: each piece on its own, joined without the sentinels."""
    pieces = [text.split(sentinel) for text in texts]
    encoded = token_ids(tokenizer, [first for first, *_ in pieces])
    for ids, (_, *rest) in zip(encoded, pieces, strict=True):
        for piece in rest:
            ids += tokenize_continuation(tokenizer, piece, anchors)
    return encoded


# Documents and rows


def encode_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a document for pretraining.

    The tokenizer's own beginning (BOS, if it adds one), the text, in which a spelled special token stays text, and EOS
    exactly once.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, expected one to end documents")
    pattern = control_pattern(tokenizer, len(tokenizer))
    if pattern.search(text):
        sentinel = unused_character(text)
        anchors = continuation_anchors(tokenizer)
        [ids] = tokenize_broken(tokenizer, [break_tokens(text, pattern, sentinel)], sentinel, anchors)
    else:
        [ids] = token_ids(tokenizer, [text])
    return default_beginning(tokenizer) + ids + [tokenizer.eos_token_id]


@lru_cache(maxsize=8)  # asked for every document
def default_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer by itself puts in front of a text."""
    [plain] = token_ids(tokenizer, ["a"])
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at]


def labels_of(row: dict) -> list[int]:
    """The labels of a row; all its tokens where it has none, as documents do."""
    return row.get("labels", row["input_ids"])


def row_segments(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a row in segments, each with whether it is trained.

    Segments are cut out of the text decoded from the start, because some tokenizers drop a space at a beginning.
    """
    ids, labels = row["input_ids"], labels_of(row)
    cuts = [i for i in range(1, len(ids)) if (labels[i] == IGNORE_INDEX) != (labels[i - 1] == IGNORE_INDEX)]
    segments: list[tuple[str, bool]] = []
    done = ""
    for cut in [*cuts, len(ids)]:
        text = str(tokenizer.decode(ids[:cut], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        segments.append((text[len(done) :], labels[cut - 1] != IGNORE_INDEX))
        done = text
    return segments


def describe_row(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row, its trained parts between ⟦ and ⟧, for the log."""
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in row_segments(row, tokenizer))
