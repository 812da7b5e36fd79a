"""From raw records to canonical rows: recognises the formats of public data sets by their keys, row by row.

Canonical rows are {"text"} for the schema "text", {"messages"} for "conversation", and {"messages", "chosen",
"rejected"[, "margin", "fault"]} for "preference". data/README.md describes every format read here.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

SCHEMAS = ("text", "conversation", "preference", "prompt")  # prompt: see `suwen.questions.prompt_rows`
COLUMN_NAMES = ("prompt", "response", "system", "text", "chosen", "rejected")
ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter", "patient", "患者", "病人", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "doctor", "医生", "助手"), "assistant"),
}
# Roles of recorded dialogues between people, who do not take turns as strictly as a user and an assistant.
SPEAKERS = ("patient", "doctor", "患者", "病人", "医生")
TURN_LISTS = ("messages", "conversations", "conversation", "dialogue-content", "dialogue", "dialog")
QUESTIONS = ("question", "questions", "ask", "title", "问", "问题", "query", "prompt", "input")
ANSWERS = ("answer", "answers", "response", "responses", "output", "target", "completion", "答", "回答", "答案")
REASONING = ("complex_cot", "reasoning_content", "reasoning")
KNOWN_KEYS = {
    *(*TURN_LISTS, *QUESTIONS, *ANSWERS, *REASONING),
    *("instruction", "instruct", "history", "system", "system_prompt", "text", "content"),
    *("chosen", "rejected", "response_chosen", "response_rejected"),
    *("margin", "chosen_score", "rejected_score", "score_chosen", "score_rejected", "fault"),
}
EXPECTED = {
    "text": 'text: a .txt line, {"text"}, {"title", "content"}, a JSON list of strings, or --columns text=COLUMN',
    "conversation": "a conversation: conversations, messages, instruction/output, question/answer, ask/answer, 问/答, "
    "Question/Complex_CoT/Response, dialogue-content, or --columns prompt=COLUMN,response=COLUMN",
    "preference": "a preference pair: conversations/chosen/rejected, question/response_chosen/response_rejected, "
    "prompt/chosen/rejected, or --columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN",
    "prompt": "a question: a conversation, a preference pair, an exam question with options, or a line of text",
}
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
PACKED_TURN = re.compile(r"<(user|bot)>\s*[:：]")

Message = dict[str, str]


class BadRow(ValueError):
    """A row that cannot be used; `reason` is short enough to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def parse_columns(columns: str | None) -> dict[str, str]:
    """ "prompt=ask,response=answer" as {"prompt": "ask", "response": "answer"}."""
    mapping: dict[str, str] = {}
    for part in (columns or "").split(",") if columns else ():
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if name not in COLUMN_NAMES or not equals or not column or name in mapping:
            raise ValueError(
                f"--columns: found {part!r}, expected pairs such as prompt=ask,response=answer with the names "
                f"{', '.join(COLUMN_NAMES)}"
            )
        mapping[name] = column
    return mapping


def canonical_rows(value: Any, schema: str, columns: dict[str, str], changes: Counter[str]) -> list[dict[str, Any]]:
    """The canonical rows of one record: one, or more where one answer stands for several wordings of its question.

    What is put right on the way (turns left out or joined) is counted in `changes`.

    Raises:
        BadRow: the record cannot be used in this schema.
    """
    if isinstance(value, str):
        if schema != "text":
            raise BadRow("wrong schema", f"found plain text, expected {EXPECTED[schema]}")
        return [{"text": _text(value, "empty text", "the line")}]
    if not isinstance(value, dict):
        raise BadRow("wrong schema", f"found {_kind(value)}, expected {EXPECTED[schema]}")
    if columns and all(column in value for column in columns.values()):
        value = {name: value[column] for name, column in columns.items()}
    fields = {str(key).strip().lower(): item for key, item in value.items() if item is not None}
    try:
        if schema == "text":
            return [{"text": _document(fields)}]
        if schema == "conversation":
            return [{"messages": messages} for messages in _conversations(fields, changes)]
        return [_preference(fields, changes)]
    except BadRow as error:
        nulls = [str(key) for key, item in value.items() if item is None]
        if nulls and error.reason == "wrong schema":
            raise BadRow("null value", f"{', '.join(nulls)} is null, expected {EXPECTED[schema]}") from None
        raise


# ------------------------------------------------------------------------------------------------------------- values


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _keys(fields: dict[str, Any]) -> str:
    return "keys " + ", ".join(fields) if fields else "no keys"


def _text(value: Any, empty: str, name: str) -> str:
    """`value` if it is text with something in it; `empty` is the reason if there is nothing."""
    if value is None:
        raise BadRow(empty, f"{name} is null, expected text")
    if not isinstance(value, str):
        raise BadRow("value is not text", f"{name} is {_kind(value)}, expected text")
    if not value.strip():
        raise BadRow(empty, f"{name} is empty, expected text")
    return value


def _optional(fields: dict[str, Any], *names: str) -> str:
    """The text under the first of these names that has any, else ""."""
    for name in names:
        value = fields.get(name)
        if value is not None and value != "" and value != []:
            return _text(value, "empty turn", name) if not isinstance(value, str) or value.strip() else ""
    return ""


def _assistant(content: Any, reasoning: str = "", name: str = "the answer") -> Message:
    """An assistant message; a leading <think>...</think> becomes its reasoning_content."""
    content = _text(content, "row without an answer", name)
    if not reasoning and content.lstrip().startswith("<think>"):
        match = THINKING.fullmatch(content)
        if match is None:
            raise BadRow("thinking never closed", f"{name} has <think> without </think>")
        reasoning, content = match[1].strip(), _text(match[2], "row without an answer", f"{name} after </think>")
    message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these values that is there and not null."""
    for name in names:
        if (value := fields.get(name)) is not None:
            return value
    return None


def _content(value: Any, name: str) -> Any:
    """The text of OpenAI's list of content parts; any other value as it is."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow("value is not text", f"{name} has a part that is not text, expected text only")
    return "".join(part["text"] for part in value)


# --------------------------------------------------------------------------------------------------------------- text


def _document(fields: dict[str, Any]) -> str:
    if "text" in fields:
        return _text(fields["text"], "empty text", "text")
    if "content" in fields and "role" not in fields:
        title, content = _optional(fields, "title"), _text(fields["content"], "empty text", "content")
        return content if not title or content.lstrip().startswith(title.strip()) else f"{title}\n{content}"
    raise BadRow("wrong schema", f"found {_keys(fields)}, expected {EXPECTED['text']}")


# ------------------------------------------------------------------------------------------------------ conversations


def _conversations(fields: dict[str, Any], changes: Counter[str]) -> list[list[Message]]:
    if _pair_names(fields):
        raise BadRow("wrong schema", f"found a preference pair ({_keys(fields)}), expected {EXPECTED['conversation']}")
    name = next((name for name in TURN_LISTS if name in fields), None)
    if name:
        messages = _with_system(_turns(fields[name], name, changes), fields)
        return [_alternating(messages, changes)]
    if "instruction" in fields or "instruct" in fields:
        answer = next((key for key in ANSWERS if key in fields), None)
        if answer is None:
            raise BadRow("row without an answer", f"found {_keys(fields)}, expected output")
        reply = _assistant(fields[answer], _optional(fields, *REASONING), answer)
        return [_alternating([*_instruction(fields), reply], changes)]
    return _question_answer(fields, changes)


def _question_answer(fields: dict[str, Any], changes: Counter[str]) -> list[list[Message]]:
    question = next((key for key in QUESTIONS if key in fields), None)
    answer = next((key for key in ANSWERS if key in fields), None)
    if question is None:
        if answer:
            raise BadRow("row without a question", f"found {_keys(fields)}, expected {EXPECTED['conversation']}")
        raise BadRow("wrong schema", f"found {_keys(fields)}, expected {EXPECTED['conversation']}")
    if answer is None:
        if "text" in fields or "content" in fields:
            raise BadRow("wrong schema", f"found {_keys(fields)}, expected {EXPECTED['conversation']}")
        raise BadRow("row without an answer", f"found {_keys(fields)}, expected {EXPECTED['conversation']}")
    if "options" in fields or {"a", "b", "c", "d"} <= fields.keys():
        raise BadRow(
            "exam question with options",
            f"found {_keys(fields)}: the options would be lost, expected {EXPECTED['conversation']}",
        )
    if isinstance(fields[question], list) and fields[question] and isinstance(fields[question][0], dict):
        reply = fields[answer]  # TRL's prompt/completion with message lists
        replies = _turns(reply, answer, changes) if isinstance(reply, list) else [_assistant(reply, name=answer)]
        return [_alternating([*_turns(fields[question], question, changes), *replies], changes)]
    replies = _flat(fields[answer])
    if len(replies) != 1:
        raise BadRow("several answers", f"{answer} is a list of {len(replies)}, expected one text")
    reply = _assistant(replies[0], _optional(fields, *REASONING), answer)
    rows = []
    for wording in _flat(fields[question]):
        if question in ("ask", "title"):
            wording = _title_and_ask(fields)
        user = {"role": "user", "content": _text(wording, "row without a question", question)}
        rows.append(_alternating(_with_system([*_history(fields), user, reply], fields), changes))
    if not rows:
        raise BadRow("row without a question", f"{question} is an empty list, expected text")
    return rows


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


def _title_and_ask(fields: dict[str, Any]) -> str:
    """The title and the question below it; one of them where the other has nothing new ("无" means "none")."""
    title, ask = _optional(fields, "title").strip(), _optional(fields, "ask").strip()
    if not ask or ask == "无" or ask in title:
        return title or ask
    return ask if title in ask else f"{title}\n{ask}"


def _instruction(fields: dict[str, Any]) -> list[Message]:
    """The prompt of an alpaca row: system, history, and instruction with input below it."""
    name = "instruction" if "instruction" in fields else "instruct"
    instruction, given = fields[name], _optional(fields, "input")
    if given and isinstance(instruction, str) and not instruction.strip():
        prompt = given
    else:
        prompt = _text(instruction, "row without a question", name)
        prompt = f"{prompt}\n{given}" if given else prompt
    if prompt.lstrip().startswith("<user>"):
        messages = _packed_turns(prompt)
    else:
        messages = [*_history(fields), {"role": "user", "content": prompt}]
    return _with_system(messages, fields)


def _packed_turns(packed: str) -> list[Message]:
    """Turns written into one string: " <user>: ... <bot>: ... <user>: ..."."""
    pieces = PACKED_TURN.split(packed)[1:]
    messages = []
    for role, content in zip(pieces[::2], pieces[1::2], strict=True):
        content = _text(content, "empty turn", f"<{role}>").strip()
        messages.append(_assistant(content) if role == "bot" else {"role": "user", "content": content})
    return messages


def _history(fields: dict[str, Any]) -> list[Message]:
    """[[question, answer], ...] or role/content messages under `history`."""
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise BadRow("value is not text", f"history is {_kind(history)}, expected a list of [question, answer]")
    if history and isinstance(history[0], dict):
        return _turns(history, "history", Counter())
    messages: list[Message] = []
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow("value is not text", f"history turn {number} is {_kind(turn)}, expected [question, answer]")
        if turn == ["", ""]:
            continue  # MedicalGPT writes an empty history so
        user = _text(turn[0], "empty turn", f"history turn {number}")
        messages += [{"role": "user", "content": user}, _assistant(turn[1], name=f"history turn {number}")]
    return messages


def _with_system(messages: list[Message], fields: dict[str, Any]) -> list[Message]:
    system = _optional(fields, "system", "system_prompt")
    if not system or messages and messages[0] == {"role": "system", "content": system}:
        return messages
    return [{"role": "system", "content": system}, *messages]


def _turns(value: Any, name: str, changes: Counter[str]) -> list[Message]:
    """Messages from a list of {role|from|speaker, content|value|sentence}.

    Recorded dialogues: sentences of one speaker in a row are one turn, empty ones (pictures) and what the doctor says
    before the patient's first word are left out, all of it counted.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise BadRow("empty turn", f"{name} is {found}, expected a list of turns")
    messages: list[Message] = []
    speakers = False
    for number, turn in enumerate(value, start=1):
        place = f"{name}, turn {number}"
        if not isinstance(turn, dict):
            raise BadRow("value is not text", f"{place} is {_kind(turn)}, expected an object with role and content")
        said = _first(turn, ("role", "from", "speaker"))
        role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None:
            raise BadRow("unknown role", f"{place} is from {said!r}, expected one of {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise BadRow("unknown role", f"{place} calls a tool, expected text only")
        speakers = speakers or said in SPEAKERS
        content = _content(_first(turn, ("content", "value", "sentence", "text")), place)
        if speakers and isinstance(content, str) and not content.strip():
            changes["empty sentences of dialogues left out"] += 1
        elif role == "assistant":
            content = _text(content, "empty turn", place)
            messages.append(_assistant(content, _optional(turn, *REASONING), place))
        elif role == "system" and isinstance(content, str) and not content.strip() and not messages:
            continue  # no system prompt, spelt out
        else:
            messages.append({"role": role, "content": _text(content, "empty turn", place)})
    return _join_speakers(messages, changes) if speakers else messages


def _join_speakers(messages: list[Message], changes: Counter[str]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**joined[-1], "content": joined[-1]["content"] + "\n" + message["content"]}
            changes["sentences of one speaker joined"] += 1
        else:
            joined.append(message)
    start = 1 if joined and joined[0]["role"] == "system" else 0
    if len(joined) > start and joined[start]["role"] == "assistant":
        del joined[start]
        changes["first turn of the doctor left out"] += 1
    return joined


def _alternating(messages: list[Message], changes: Counter[str]) -> list[Message]:
    """Check the order system?, user, assistant, user, assistant...; a last user turn without answer is left out."""
    start = _check_order(messages)
    turns = len(messages) - start
    if turns < 2:
        raise BadRow("row without an answer", f"found turns: {turns}, expected a question and its answer")
    if messages[-1]["role"] == "user":
        changes["last user turn without answer left out"] += 1
        return messages[:-1]
    return messages


def _check_order(messages: list[Message]) -> int:
    """The number of system messages at the head, 0 or 1."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    for number, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            found = f"message {number + start + 1} is from {message['role']!r}, expected {expected!r}"
            raise BadRow("roles out of order", found)
    return start


# -------------------------------------------------------------------------------------------------------- preferences


def _pair_names(fields: dict[str, Any]) -> tuple[str, str] | None:
    pairs = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
    return next((pair for pair in pairs if pair[0] in fields or pair[1] in fields), None)


def _preference(fields: dict[str, Any], changes: Counter[str]) -> dict[str, Any]:
    names = _pair_names(fields)
    if names is None:
        raise BadRow("wrong schema", f"found {_keys(fields)}, expected {EXPECTED['preference']}")
    for name in names:
        if name not in fields:
            raise BadRow("row without an answer", f"found {_keys(fields)} but no {name}")
    answers = [_reply_turns(fields[name], name, changes) for name in names]
    prompt = _prompt(fields, changes)
    if prompt is None:  # implicit: both hold the whole conversation
        shared = 0
        while shared < min(map(len, answers)) - 1 and answers[0][shared] == answers[1][shared]:
            shared += 1
        prompt = answers[0][:shared]
    start = _check_order(prompt)
    if len(prompt) == start or prompt[-1]["role"] != "user":
        raise BadRow("row without a question", "the prompt does not end with a user turn")
    row: dict[str, Any] = {"messages": prompt}
    for key, name, turns in zip(("chosen", "rejected"), names, answers, strict=True):
        whole = [turn for turn in prompt if turn["role"] != "system"] if turns[0]["role"] != "system" else prompt
        if len(turns) > 1 and turns[: len(whole)] == whole:
            turns = turns[len(whole) :]
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            found = ", ".join(turn["role"] for turn in turns) or "nothing"
            raise BadRow("roles out of order", f"{name} after the prompt is {found}, expected one assistant turn")
        row[key] = turns
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        raise BadRow("chosen equals rejected", "expected two different answers")
    margin, fault = _margin(fields), fields.get("fault")
    if margin is not None:
        row["margin"] = margin
    if isinstance(fault, str) and fault.strip():  # what is wrong with the rejected answer
        row["fault"] = fault.strip()
    return row


def _reply_turns(value: Any, name: str, changes: Counter[str]) -> list[Message]:
    if isinstance(value, dict):
        value = [value]
    return _turns(value, name, changes) if isinstance(value, list) else [_assistant(value, name=name)]


def _prompt(fields: dict[str, Any], changes: Counter[str]) -> list[Message] | None:
    name = next((name for name in (*TURN_LISTS, "prompt", "question", "query") if name in fields), None)
    if name is None:
        return _instruction(fields) if "instruction" in fields else None
    if name in TURN_LISTS or isinstance(fields[name], list):
        return _with_system(_turns(fields[name], name, changes), fields)
    user = {"role": "user", "content": _text(fields[name], "row without a question", name)}
    return _with_system([*_history(fields), user], fields)


def _margin(fields: dict[str, Any]) -> float | None:
    """By how much chosen is better, where the data say so: `margin`, or the difference of the two scores."""
    if "margin" in fields:
        values = [fields["margin"], 0.0]
    else:
        names = ("chosen_score", "rejected_score") if "chosen_score" in fields else ("score_chosen", "score_rejected")
        values = [fields.get(name) for name in names]
        if None in values:
            return None
    try:
        margin = float(values[0]) - float(values[1])
    except (TypeError, ValueError):
        raise BadRow("margin is not a number", f"found {values[0]!r} and {values[1]!r}, expected numbers") from None
    if not margin >= 0 or margin == float("inf"):
        raise BadRow("chosen scored below rejected", f"margin {margin}, expected 0 or more")
    return margin
