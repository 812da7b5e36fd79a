"""A chat page for a model, in the browser.

    python gradio_demo.py --base_model outputs/sft-merged
    python gradio_demo.py --base_model Qwen/Qwen3-8B --lora_model outputs/sft --quantization 4bit --port 7861

Without --base_model the newest finished stage in outputs/ answers, else the embedded model. The page is served to this
machine only; any other --host needs --auth. Nothing that is typed is stored or sent elsewhere. The answers are research
output, not medical advice.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from suwen.arguments import run
from suwen.network import check_address, is_loopback
from suwen.prompts import with_system_prompt
from suwen.serving import (
    Served,
    add_model_flags,
    add_removed_flags,
    add_sampling_flags,
    check_serving_flags,
    generation_settings,
    load_served,
    say,
    serving_parser,
)

TITLE = "素问 Suwen"
NOTICE = "回答由人工智能生成，仅供研究，**不构成医疗建议**；身体不适请及时就医，**急症请拨打 120**。"
EXAMPLES = (
    "高血压患者在饮食上应该注意什么？",
    "孩子发烧到三十九度应该怎么处理？",
    "糖尿病的典型症状有哪些？需要做哪些检查？",
    "阿莫西林有哪些常见的不良反应？",
    "孕期可以服用布洛芬吗？",
    "体检发现甲状腺结节，下一步该怎么办？",
)
QUESTION_CHARACTERS = 8000
ANSWER_TOKENS = 4096
WAITING_REQUESTS = 32
REASONING_TITLE = "思考过程"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = serving_parser(__doc__ or "")
    group = parser.add_argument_group("page")
    group.add_argument("--host", "--server_name", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", "--server_port", type=int, default=7860, help="port to listen on (default: 7860)")
    group.add_argument("--auth", metavar="USER:PASSWORD", help="log-in; without it the page is for this machine only")
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_removed_flags(
        parser,
        {
            "share": "a public link would pass questions through a foreign server; use --host with --auth",
            "max_length": "use --max_new_tokens; a prompt may fill the model's window",
            "context_len": "the model's own window is used",
        },
    )
    args = parser.parse_args(argv)
    if args.auth is not None and not all(args.auth.partition(":")[::2]):
        raise ValueError("--auth: expected user:password, both not empty")
    if not 0 < args.port < 65536:
        raise ValueError(f"--port: found {args.port}, expected 1 to 65535")
    if not is_loopback(args.host) and not args.auth:
        raise ValueError(f"--host {args.host}: anyone who can reach it could use the page; add --auth user:password")
    check_serving_flags(args)
    return args


def history_messages(history: list[dict]) -> list[dict]:
    """The page's record of a chat as messages; the thinking part, shown apart, goes back into its answer."""
    messages: list[dict] = []
    reasoning = ""
    for entry in history:
        content = entry["content"]
        if isinstance(content, list):  # parts, each {"type": "text", "text": ...}
            content = "".join(part.get("text", "") for part in content)
        if (entry.get("metadata") or {}).get("title") == REASONING_TITLE:
            reasoning = content
            continue
        message = {"role": entry["role"], "content": content}
        if reasoning and entry["role"] == "assistant":
            message["reasoning_content"] = reasoning
        reasoning = ""
        messages.append(message)
    return drop_unanswered(messages)


def drop_unanswered(messages: list[dict]) -> list[dict]:
    """Leave out questions whose answer was stopped before its first word, so that roles alternate."""
    kept: list[dict] = []
    for message in messages:
        if kept and kept[-1]["role"] == message["role"]:
            kept.pop()
        if message["role"] == "user" or kept and message["content"].strip():
            kept.append(message)
    return kept[:-1] if kept and kept[-1]["role"] == "user" else kept


class Page:
    """What answers behind the page: one model, one answer at a time, the others wait in the queue."""

    def __init__(self, served: Served, args: argparse.Namespace) -> None:
        self.served = served
        self.settings = generation_settings(args)

    def answer(
        self,
        message: str,
        history: list[dict],
        system_prompt: str = "",
        max_new_tokens: float = 512,
        temperature: float = 0,
        top_p: float = 0.9,
        repetition_penalty: float = 1,
    ) -> Iterator[Any]:
        """Stream the answer to one question as the whole text so far."""
        import gradio as gr

        from suwen.generation import fit_prompt, stream

        messages = [*history_messages(history), {"role": "user", "content": message[:QUESTION_CHARACTERS]}]
        try:
            if not message.strip():
                raise ValueError("the question is empty")
            settings = replace(
                self.settings,
                max_new_tokens=int(min(max_new_tokens, max(ANSWER_TOKENS, self.settings.max_new_tokens))),
                temperature=temperature,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
            )
            messages = with_system_prompt(messages, system_prompt.strip())
            ids, dropped = fit_prompt(self.served.encoder, messages, self.served.window, settings.max_new_tokens)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if dropped:
            gr.Info("对话超出模型的窗口，最早的几轮已不再参与回答。")
        parts = {"reasoning": "", "content": ""}
        pieces = stream(self.served.model, self.served.encoder, ids, settings)
        try:
            for kind, text in pieces:
                parts[kind] += text
                yield self.shown(parts)
            if not parts["content"]:
                yield self.shown({**parts, "content": "（模型没有给出回答）"})
        finally:  # the stop button closes this generator: the model must not go on for nobody
            pieces.close()

    def shown(self, parts: dict[str, str]) -> Any:
        from gradio import ChatMessage

        if not parts["reasoning"]:
            return parts["content"]
        status = "done" if parts["content"] else "pending"
        thought = ChatMessage(
            role="assistant", content=parts["reasoning"], metadata={"title": REASONING_TITLE, "status": status}
        )
        return [thought, ChatMessage(role="assistant", content=parts["content"])] if parts["content"] else [thought]


def build_page(served: Served, args: argparse.Namespace) -> Any:
    import gradio as gr

    page = Page(served, args)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True) as blocks:
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(NOTICE, elem_id="notice")
        with gr.Sidebar(position="right", open=False):
            gr.Markdown("### 设置")
            controls = [
                gr.Textbox(args.system_prompt, label="系统提示词", lines=3, max_length=QUESTION_CHARACTERS),
                gr.Slider(
                    1, max(ANSWER_TOKENS, args.max_new_tokens), args.max_new_tokens, step=1, label="回答最多的词元数"
                ),
                gr.Slider(
                    0, max(2, args.temperature), args.temperature, step=0.05, label="温度（0：每次取最可能的词）"
                ),
                gr.Slider(0.01, 1, args.top_p, step=0.01, label="top-p"),
                gr.Slider(
                    min(1, args.repetition_penalty),
                    max(2, args.repetition_penalty),
                    args.repetition_penalty,
                    step=0.01,
                    label="重复惩罚（1：无）",
                ),
            ]
            gr.Markdown(f"模型：`{' + '.join(served.names)}`")
        gr.ChatInterface(
            page.answer,
            chatbot=gr.Chatbot(
                label="素问（人工智能生成）",
                placeholder="请输入您的健康问题。",
                scale=1,
                buttons=["copy"],
                sanitize_html=True,
                allow_tags=False,
                feedback_options=None,
            ),
            textbox=gr.Textbox(
                placeholder="请输入问题，回车发送", max_length=QUESTION_CHARACTERS, submit_btn=True, stop_btn=True
            ),
            additional_inputs=controls,
            examples=[[example] for example in EXAMPLES],
            cache_examples=False,
            analytics_enabled=False,
            api_name="chat",
            api_visibility="undocumented",
        )
    return blocks.queue(max_size=WAITING_REQUESTS, default_concurrency_limit=1)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_address(args.host, args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    served = load_served(args)
    import gradio as gr

    page = build_page(served, args)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size="1mb",
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    say(f"page: http://{args.host}:{args.port}")
    page.block_thread()


if __name__ == "__main__":
    run(main)
