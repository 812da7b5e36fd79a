"""The page as a whole: the notice, the tabs, the side panel."""

from __future__ import annotations

from typing import Any

import gradio as gr

from suwen.page.chat import chat_tab
from suwen.page.compare import compare_tab
from suwen.page.page import QUESTION_CHARACTERS, Page

TITLE = "素问 Suwen"
WAITING_REQUESTS = 32
CSS = """
#notice { border-left: 4px solid #d97706; padding: .4rem .8rem; background: var(--background-fill-secondary); }
#notice p { margin: 0; }
.bot.message .message-content::after, .ai-generated:not(:has(.ai-generated)):not(:empty)::after {
  content: "AI 生成 · AI-generated"; display: block; margin-top: .35rem; font-size: .7rem;
  color: var(--body-text-color-subdued);
}
/* Above an answer stand the referral, whose title is bold, and the thinking part; neither carries the answer's label */
.bot.message .thought-group .message-content::after { content: none; }
.thought-group:has(.title strong) { border: 2px solid #dc2626; }
.thought-group:has(.title strong) .prose * { color: var(--body-text-color) !important; font-size: 1rem !important; }
#examples .label { display: none; }
#history { max-height: 40vh; overflow-y: auto; }
.source { margin: .4rem 0; border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .35rem .6rem; }
.source summary { cursor: pointer; }
.source small { display: block; color: var(--body-text-color-subdued); }
.source blockquote { margin: .4rem 0 0; white-space: pre-wrap; max-height: 12rem; overflow-y: auto; }
.warning { color: #b45309; }
.referral { border: 2px solid #dc2626; border-radius: 6px; padding: .5rem .8rem; }
.candidate { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .8rem; }
.timing .prose * { color: var(--body-text-color-subdued) !important; font-size: .8rem !important; }
#tally :is(table, th, td) { border-color: var(--border-color-primary) !important; }
"""


def theme() -> Any:
    """Fonts of the reader's machine: nothing is fetched from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(page: Page) -> gr.Blocks:
    t, settings = page.translate, page.settings
    names = list(page.models)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}", elem_id="title")
        gr.Markdown(t("notice"), elem_id="notice")
        with gr.Sidebar(position="right", open=False, elem_id="side"):
            gr.Markdown(t("settings"))
            model = gr.Dropdown(names, value=names[0], label=t("model"), interactive=len(names) > 1)
            controls = [
                gr.Textbox(page.system_prompt, label=t("system_prompt"), lines=3, max_length=QUESTION_CHARACTERS),
                gr.Slider(1, page.longest_answer, settings.max_new_tokens, step=1, label=t("max_new_tokens")),
                gr.Slider(0, max(2, settings.temperature), settings.temperature, step=0.05, label=t("temperature")),
                gr.Slider(0.01, 1, settings.top_p, step=0.01, label=t("top_p")),
                gr.Slider(0, max(200, settings.top_k), settings.top_k, step=1, label=t("top_k")),
                gr.Slider(
                    min(1, settings.repetition_penalty),
                    max(2, settings.repetition_penalty),
                    settings.repetition_penalty,
                    step=0.01,
                    label=t("repetition_penalty"),
                ),
                gr.Textbox("" if settings.seed is None else str(settings.seed), label=t("seed"), max_length=18),
            ]
            use_sources = gr.Checkbox(True, label=t("use_sources"))
            gr.Markdown(t("privacy"), elem_classes="timing")
            if page.feedback.path:
                gr.Markdown(t("feedback_kept"), elem_classes="timing")
        if len(names) > 1:
            with gr.Tabs():
                with gr.Tab(t("chat")):
                    chat_tab(page, model, controls, use_sources)
                with gr.Tab(t("compare"), elem_id="compare-tab"):
                    compare_tab(page, controls)
        else:
            chat_tab(page, model, controls, use_sources)
    return blocks.queue(max_size=WAITING_REQUESTS, default_concurrency_limit=page.at_once)
