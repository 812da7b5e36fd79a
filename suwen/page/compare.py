"""The comparison tab: the same question to two to four models, side by side, and a blind vote.

The models answer one after another, so that the time of each is its own. All draw with the same seed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from suwen.batching import Busy
from suwen.page.chat import asked_settings, failure_text, paced, referral, refuse
from suwen.page.page import QUESTION_CHARACTERS, Page
from suwen.page.texts import Language, text
from suwen.prompts import with_system_prompt

LETTERS = "ABCD"


@dataclass
class Round:
    """One question and its answers, in the order of the columns."""

    question: str
    names: list[str]
    blind: bool
    answers: list[str] = field(default_factory=list)  # of the columns that are done
    lines: list[str] = field(default_factory=list)  # how long each took
    voted: bool = False

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.names)


def asker(page: Page) -> Any:
    """The function behind the button: a generator of what `round_view` shows."""

    def ask(
        request: gr.Request, question: str, chosen: list[str], blind: bool, system_prompt: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        language = page.language_of(request)
        if not question.strip():
            raise refuse(text("empty_question", language))
        if not 2 <= len(chosen) <= len(LETTERS):
            raise refuse(text("two_to_four", language))
        names = random.SystemRandom().sample(chosen, len(chosen)) if blind else list(chosen)
        try:
            settings = asked_settings(page, *values)
        except ValueError as error:
            raise refuse(failure_text(error, language)) from None
        if settings.seed is None:  # one for all of them
            settings = replace(settings, seed=random.SystemRandom().getrandbits(31))
        now = Round(question[:QUESTION_CHARACTERS], names, blind)
        messages = with_system_prompt([{"role": "user", "content": now.question}], system_prompt.strip())
        warning = referral(now.question, language)
        yield round_view(page, now, language, warning)
        for name in names:
            began, first, parts = time.perf_counter(), 0.0, {"reasoning": "", "content": ""}
            tokens, problem = 0, ""
            try:
                reply = page.models[name].ask(messages, settings, None)
                try:
                    for _ in paced(reply.pieces, parts):
                        first = first or time.perf_counter() - began
                        yield round_view(page, now, language, warning, parts["content"] or parts["reasoning"])
                finally:
                    reply.pieces.close()
                tokens = reply.tokens
            except (Busy, ValueError, TimeoutError, RuntimeError) as error:
                problem = failure_text(error, language)
            total = time.perf_counter() - began
            now.answers.append(parts["content"] or problem or text("no_answer", language))
            now.lines.append(text("latency", language, first, total, tokens, tokens / total))
        yield round_view(page, now, language, warning)

    return ask


def round_view(page: Page, now: Round, language: Language, warning: str, running: str = "") -> tuple[Any, ...]:
    """What the tab shows of a round: the state, the referral, the buttons, the tally, and its columns.

    There is something to stop only while models answer. Pieces of an answer leave the stop button as it is: one that is
    on its way when it is pressed would light it again.
    """
    columns: list[Any] = []
    for place, letter in enumerate(LETTERS):
        if place >= len(now.names):
            columns += [gr.Column(visible=False), "", "", ""]
            continue
        known = not now.blind or now.voted
        title = text("candidate", language, letter) + (f" · {now.names[place]}" if known else "")
        done = place < len(now.answers)
        answer = now.answers[place] if done else running if place == len(now.answers) else ""
        columns += [gr.Column(visible=True), f"**{title}**", answer, now.lines[place] if done else ""]
    voting = now.complete and not now.voted
    buttons = [gr.Button(visible=voting and place < len(now.names)) for place in range(len(LETTERS))]
    tally = tally_text(page, language) if now.voted or not now.blind else ""
    stop = gr.skip() if running else gr.Button(interactive=not now.complete)
    above = [gr.Markdown(warning, visible=bool(warning)), stop]
    return now, *above, gr.Column(visible=voting), *buttons, tally, *columns


def voter(page: Page, place: int | None) -> Any:
    """Count the vote for a column, None for a tie; then the names are shown."""

    def vote(request: gr.Request, now: Round | None) -> tuple[Any, ...]:
        language = page.language_of(request)
        if now is None or not now.complete:
            raise refuse(text("tally_empty", language))
        if not now.voted:
            now.voted = True
            best = None if place is None else now.names[place]
            answers = dict(zip(now.names, now.answers, strict=True))
            page.feedback.vote(best, answers, now.question, [page.models[name].fingerprint for name in now.names])
        return round_view(page, now, language, referral(now.question, language))

    return vote


def tally_text(page: Page, language: Language) -> str:
    standings = page.feedback.standings()
    lines = [] if standings else [text("tally_empty", language)]
    if standings:
        lines = [text("tally", language), "---|---|---|---"]
        lines += [
            f"{s.name} | {s.won} / {s.voted} | {s.won / s.voted:.0%} | {s.interval.low:.0%} – {s.interval.high:.0%}"
            for s in standings
        ]
    if page.feedback.ties:
        lines += ["", text("tally_ties", language, page.feedback.ties)]
    return "\n".join(lines)


def compare_tab(page: Page, controls: list[Any]) -> None:
    t, names = page.translate, list(page.models)
    now = gr.State(None)
    with gr.Group():
        question = gr.Textbox(
            label=t("compare_question"), max_length=QUESTION_CHARACTERS, lines=2, elem_id="compare-question"
        )
        chosen = gr.CheckboxGroup(names, value=names[: len(LETTERS)], label=t("compare_models"))
        blind = gr.Checkbox(True, label=t("blind"))
    with gr.Row():
        start = gr.Button(t("ask"), variant="primary", elem_id="compare-ask")
        stop = gr.Button(t("stop"), variant="stop", interactive=False, elem_id="compare-stop")
    warning = gr.Markdown(visible=False, elem_classes="referral", sanitize_html=True)
    columns: list[Any] = []
    with gr.Row(elem_id="answers"):
        for _ in LETTERS:
            with gr.Column(visible=False, min_width=240, elem_classes="candidate") as column:
                title = gr.Markdown()
                answer = gr.Markdown(sanitize_html=True, elem_classes="candidate-answer ai-generated")
                line = gr.Markdown(elem_classes="timing")
            columns += [column, title, answer, line]
    with gr.Column(visible=False, elem_id="votes") as votes:
        gr.Markdown(t("vote"))
        with gr.Row():
            buttons = [gr.Button(letter, visible=False, elem_id=f"vote-{letter}") for letter in LETTERS]
            tie = gr.Button(t("tie"), elem_id="vote-tie")
    tally = gr.Markdown(elem_id="tally")
    outputs = [now, warning, stop, votes, *buttons, tally, *columns]
    common: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    inputs = [question, chosen, blind, *controls]
    asked = gr.on(
        [start.click, question.submit], asker(page), inputs, outputs, concurrency_limit=page.at_once, **common
    )
    stop.click(
        lambda: gr.Button(interactive=False), None, [stop], cancels=[asked], queue=False, api_visibility="private"
    )
    for place, button in enumerate([*buttons, tie]):
        button.click(voter(page, place if place < len(LETTERS) else None), [now], outputs, **common)
