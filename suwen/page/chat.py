"""The chat tab: one model, several turns, sources, sampling, feedback, export."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio as gr

from suwen.batching import Busy
from suwen.chat_models import Pieces
from suwen.generation_settings import GenerationSettings
from suwen.page.conversation import export_json, export_text, history_messages
from suwen.page.page import QUESTION_CHARACTERS, Page
from suwen.page.sources import FILE_KINDS, Documents, index_files, sources_html
from suwen.page.texts import Language, reason_text, text
from suwen.prompts import with_system_prompt
from suwen.red_flags import find_red_flags

EXAMPLES_FILE = Path(__file__).resolve().parents[2] / "data" / "page" / "examples.json"
REFRESH = 0.05  # seconds
DOWNLOAD = """(file) => {
  if (!file) return;
  const [name, kind, content] = JSON.parse(file);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {type: kind}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def failure_text(error: Exception, language: Language) -> str:
    """What people are told when no answer comes; inner messages stay inside."""
    if isinstance(error, Busy):
        return text("busy", language)
    if isinstance(error, TimeoutError):
        return text("too_slow", language)
    return text("failed", language, str(error) if isinstance(error, ValueError) else type(error).__name__)


def refuse(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def referral(question: str, language: Language) -> str:
    """What stands above the answer to a question that tells of an emergency; "" for any other."""
    flags = find_red_flags(question)
    return "\n\n".join(flag.zh if language == "zh" else flag.en for flag in flags)


def paced(pieces: Pieces, parts: dict[str, str]) -> Iterator[dict[str, str]]:
    """Add the pieces to `parts` as they come, and tell of them at most 1 / REFRESH times a second.

    The browser draws the whole answer each time, so that a fast model would keep it from hearing the stop button.
    """
    told = 0.0
    for kind, piece in pieces:
        parts[kind] += piece
        if time.monotonic() - told >= REFRESH:
            yield parts
            told = time.monotonic()


def asked_settings(page: Page, *values: Any) -> GenerationSettings:
    """The settings of the side panel, in the order of its controls, within the page's limits."""
    max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed = values
    if seed.strip() and not seed.strip().isdecimal():
        raise ValueError(f"seed: found {seed.strip()!r}, expected a whole number, or nothing")
    return replace(
        page.settings,
        max_new_tokens=int(min(max_new_tokens, page.longest_answer)),
        temperature=temperature,
        top_p=top_p,
        top_k=int(top_k),
        repetition_penalty=repetition_penalty,
        seed=int(seed) if seed.strip() else None,
    )


def shown(parts: dict[str, str], warning: str, language: Language) -> Any:
    """An answer so far as the chat component takes it: the referral, the thinking part, the answer."""
    messages = []
    if warning:
        title = text("referral", language)
        messages.append(gr.ChatMessage(role="assistant", content=warning, metadata={"title": title}))
    if parts["reasoning"]:
        title, status = text("reasoning", language), "done" if parts["content"] else "pending"
        metadata: Any = {"title": title, "status": status}
        messages.append(gr.ChatMessage(role="assistant", content=parts["reasoning"], metadata=metadata))
    if not messages:
        return parts["content"]
    if parts["content"]:
        messages.append(gr.ChatMessage(role="assistant", content=parts["content"]))
    return messages


def answerer(page: Page) -> Any:
    """The function behind the chat: a generator of (messages, sources), the whole text so far each time."""

    def answer(
        message: str,
        history: list[dict],
        model: str,
        system_prompt: str,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        top_k: float,
        repetition_penalty: float,
        seed: str,
        use_sources: bool,
        documents: Documents | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, str]]:
        language = page.language_of(request)
        knowledge = (documents.knowledge if documents else page.knowledge) if use_sources else None
        messages = [*history_messages(history), {"role": "user", "content": message[:QUESTION_CHARACTERS]}]
        parts, warning = {"reasoning": "", "content": ""}, referral(message, language)
        try:
            if not message.strip():
                raise refuse(text("empty_question", language))
            settings = asked_settings(page, max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
            messages = with_system_prompt(messages, system_prompt.strip())
            if warning:
                yield shown(parts, warning, language), ""
            reply = page.models[model].ask(messages, settings, knowledge)
            if reply.dropped:
                gr.Info(text("dropped", language))
            sources = sources_html(reply.hits, None, language, reply.abstained)
            try:
                for now in paced(reply.pieces, parts):
                    yield shown(now, warning, language), sources
            finally:  # the stop button closes this generator: the model must not go on for nobody
                reply.pieces.close()
        except (Busy, ValueError, TimeoutError, RuntimeError) as error:
            if not parts["content"] and not warning:
                raise refuse(failure_text(error, language)) from None
            gr.Warning(failure_text(error, language))
            yield shown({**parts, "content": parts["content"] or failure_text(error, language)}, warning, language), ""
            return
        parts["content"] = parts["content"] or text("no_answer", language)
        if reply.abstained:
            parts["content"] = text("not_found", language)
        yield shown(parts, warning, language), sources_html(reply.hits, parts["content"], language, reply.abstained)

    return answer


def chat_tab(page: Page, model: Any, controls: list[Any], use_sources: Any) -> None:
    """Build the tab; `controls`: the side panel's that `asked_settings` reads, the system prompt before them."""
    t = page.translate
    documents = gr.State(None, time_to_live=3600, delete_callback=lambda kept: kept and kept.remove())
    sources = gr.HTML("", elem_id="sources", render=False)
    conversation = gr.ChatInterface(
        answerer(page),
        chatbot=gr.Chatbot(
            label=t("chatbot"),
            placeholder=t("placeholder"),
            elem_id="chat",
            height="60vh",
            min_height=320,
            scale=1,
            buttons=["copy"],
            sanitize_html=True,
            allow_tags=False,
            feedback_options=("Like", "Dislike") if page.feedback.path else None,
        ),
        textbox=gr.Textbox(
            label=t("question"),
            placeholder=t("question"),
            max_length=QUESTION_CHARACTERS,
            submit_btn=True,
            stop_btn=True,
            elem_id="question",
        ),
        additional_inputs=[model, *controls, use_sources, documents],
        additional_outputs=[sources],
        editable=True,
        save_history=True,
        analytics_enabled=False,
        concurrency_limit=page.at_once,
        api_name="chat",
        api_visibility="undocumented",
    )
    conversation.chat_history_dataset.elem_id = "history"
    conversation.new_chat_button.value = t("new_chat")  # Gradio has it in English only
    # Kept under one name and key, so that a browser finds its chats again after the server's restart. The key is no
    # secret: it would be the same for everyone on that browser anyway.
    kept = conversation.saved_conversations
    kept.storage_key, kept.secret = "suwen-conversations", "suwen"
    with gr.Row(elem_id="below"):
        with gr.Column(min_width=280), gr.Accordion(t("examples"), open=True, elem_id="examples"), gr.Tabs():
            for department in json.loads(EXAMPLES_FILE.read_text(encoding="utf-8"))["departments"]:
                with gr.Tab(t(department["department"])):
                    gr.Examples([[question] for question in department["questions"]], [conversation.textbox])
        with gr.Column(min_width=280), gr.Accordion(t("sources"), open=True, elem_id="sources-panel"):
            sources.render()
            files = gr.File(
                label=t("documents"), file_count="multiple", file_types=list(FILE_KINDS), height=150, elem_id="files"
            )
            note = gr.Markdown(t("documents_note"), elem_id="files-note")
    files.change(
        reader(page),
        [files, documents],
        [documents, note],
        api_visibility="private",
        concurrency_limit=1,
        concurrency_id="index",
    )
    add_exports(page, conversation.chatbot, [model, *controls])
    if page.feedback.path:
        conversation.chatbot.like(
            rater(page), [conversation.chatbot, model, controls[0]], None, api_visibility="private"
        )


def reader(page: Page) -> Any:
    def read(paths: list[str] | None, before: Documents | None, request: gr.Request) -> tuple[Documents | None, Any]:
        """Index the files that lie in the drop area; the index before goes."""
        language = page.language_of(request)
        if before:
            before.remove()
        if not paths:
            return None, text("documents_note", language)
        try:
            found = index_files(paths, page.folder, page.retrieval, language)
        except ValueError as error:
            return None, text("unreadable", language, reason_text(str(error), language))
        return found, f"{found.note}  \n{text('documents_note', language)}"

    return read


def rater(page: Page) -> Any:
    def rate(data: gr.LikeData, request: gr.Request, history: list[dict], model: str, system_prompt: str) -> None:
        place = data.index if isinstance(data.index, int) else data.index[0]
        while place + 1 < len(history) and history[place + 1]["role"] == "assistant":
            place += 1  # a thought or a referral was clicked: its answer follows
        messages = with_system_prompt(history_messages(history[: place + 1]), system_prompt.strip())
        if messages and data.liked in (True, False):
            page.feedback.rate(data.liked, messages, page.models[model].fingerprint)
            gr.Info(text("thanks", page.language_of(request)))

    return rate


def add_exports(page: Page, chatbot: Any, inputs: list[Any]) -> None:
    """Buttons that hand the chat to the browser as a file; nothing of it is stored on the server."""
    prepared = gr.Textbox(visible="hidden", elem_id="export")

    def exporter(kind: str) -> Any:
        def export(request: gr.Request, history: list[dict], model: str, system_prompt: str, *values: Any) -> str:
            language = page.language_of(request)
            messages = with_system_prompt(history_messages(history), system_prompt.strip())
            if not messages:
                gr.Info(text("nothing_to_export", language))
                return ""
            settings, fingerprint = asdict(asked_settings(page, *values)), page.models[model].fingerprint
            if kind == "json":
                return json.dumps(["suwen-chat.json", "application/json", export_json(messages, fingerprint, settings)])
            content = export_text(messages, fingerprint, settings, language)
            return json.dumps(["suwen-chat.md", "text/markdown", content])

        return export

    with gr.Row(elem_id="exports"):
        for kind in ("md", "json"):
            button = gr.Button(page.translate(f"export_{kind}"), size="sm", elem_id=f"export-{kind}")
            button.click(exporter(kind), [chatbot, *inputs], prepared, api_visibility="private").success(
                None, prepared, None, js=DOWNLOAD
            )
