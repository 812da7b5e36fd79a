"""A chat as the page keeps it, as messages for the model, and as a file for its user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from suwen.page.texts import TEXTS, Language, text
from suwen.records import timestamp

# The page shows these beside an answer; they are no part of what the model said
ASIDES = {TEXTS["referral"], TEXTS["sources"]}
REASONING = TEXTS["reasoning"]


def history_messages(history: Sequence[dict[str, Any]]) -> list[dict]:
    """The page's record of a chat as messages; the thinking part, shown apart, goes back into its answer.

    Questions that got no answer, or whose answer was stopped before its first word, are left out, so that roles
    alternate.
    """
    messages: list[dict] = []
    reasoning = ""
    for entry in history:
        title = (entry.get("metadata") or {}).get("title")
        if any(title in aside for aside in ASIDES if title):
            continue
        if title in REASONING:
            reasoning = plain(entry["content"])
            continue
        content = plain(entry["content"])
        message = {"role": entry["role"], "content": "" if content in TEXTS["no_answer"] else content}
        if reasoning and entry["role"] == "assistant":
            message["reasoning_content"] = reasoning
        reasoning = ""
        messages.append(message)
    return drop_unanswered(messages)


def plain(content: Any) -> str:
    """Text, or parts of it as the page sends them: [{"type": "text", "text": ...}]."""
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return content if isinstance(content, str) else ""


def drop_unanswered(messages: list[dict]) -> list[dict]:
    kept: list[dict] = []
    for message in messages:
        if kept and kept[-1]["role"] == message["role"]:
            kept.pop()
        if message["role"] == "user" or kept and message["content"].strip():
            kept.append(message)
    return kept[:-1] if kept and kept[-1]["role"] == "user" else kept


def export_json(messages: list[dict], model: dict[str, Any], settings: dict[str, Any]) -> str:
    """A chat as one JSON object, whose messages training reads."""
    row = {
        "ai_generated": True,
        "notice": " / ".join(TEXTS["notice"]).replace("**", ""),
        "exported_at": timestamp(),
        "model": model,
        "settings": settings,
        "messages": messages,
    }
    return json.dumps(row, ensure_ascii=False, indent=2) + "\n"


def export_text(messages: list[dict], model: dict[str, Any], settings: dict[str, Any], language: Language) -> str:
    """A chat as Markdown for people; every answer carries its label."""
    lines = [f"# 素问 Suwen · {text('ai_generated', language)}", "", f"> {text('notice', language)}", ""]
    facts = {**model, "settings": json.dumps(settings, ensure_ascii=False), "exported": timestamp()}
    lines += [f"- {name}: `{value}`" for name, value in facts.items()] + [""]
    for message in messages:
        if message["role"] == "system":
            lines += [f"### {text('system_prompt', language)}", "", message["content"], ""]
            continue
        lines += [text("about_answer" if message["role"] == "assistant" else "about_question", language), ""]
        if thought := message.get("reasoning_content"):
            lines += [f"**{text('reasoning', language)}**", "", thought, ""]
        lines += [message["content"], ""]
    return "\n".join(lines)
