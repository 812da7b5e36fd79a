"""A chat page for a model, in the browser.

    python gradio_demo.py --base_model outputs/sft-merged
    python gradio_demo.py --base_model Qwen/Qwen3-8B --lora_model outputs/sft dpo=outputs/dpo --quantization 4bit
    python gradio_demo.py --knowledge_index outputs/knowledge --feedback_file outputs/feedback.jsonl
    python gradio_demo.py --api_base http://127.0.0.1:8000/v1

Several models can be compared side by side, with a blind vote: a base and its LoRA folders, which are loaded once and
switched, whole models by --compare_models, or the names at an endpoint. Files dropped on the page are a private
knowledge base of that session. Without --base_model the newest finished stage in outputs/ answers, else the embedded
model. The page is served to this machine only; any other --host needs --auth. What is typed stays in the browser, but
for --feedback_file. The answers are research output, not medical advice.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from typing import Any

from suwen.command_line import run
from suwen.network import check_address, is_loopback
from suwen.retrieval.flags import add_retrieval_flags, check_retrieval_flags, load_knowledge, retrieval_settings
from suwen.serving import (
    add_endpoint_flags,
    add_model_flags,
    add_removed_flags,
    add_sampling_flags,
    check_endpoint_flags,
    check_serving_flags,
    generation_settings,
    say,
    serving_parser,
)

UPLOAD_SIZE = "20mb"
REQUEST_BYTES = 32 << 20  # a whole conversation, or files uploaded together


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = serving_parser(__doc__ or "")
    group = parser.add_argument_group("page")
    group.add_argument("--host", "--server_name", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", "--server_port", type=int, default=7860, help="port to listen on (default: 7860)")
    group.add_argument("--auth", metavar="USER:PASSWORD", help="log-in; without it the page is for this machine only")
    group.add_argument(
        "--language", choices=("auto", "zh", "en"), default="auto", help="of the page (default: auto, the browser's)"
    )
    group.add_argument(
        "--feedback_file", metavar="FILE", help="keep likes, dislikes and votes there, personal data masked"
    )
    group.add_argument(
        "--compare_models", nargs="+", metavar="[NAME=]PATH", help="whole models to compare with, loaded beside"
    )
    group.add_argument(
        "--max_batch_size", type=int, default=4, metavar="N", help="questions answered together (default: 4)"
    )
    add_model_flags(parser, switchable=True)
    add_endpoint_flags(parser, concurrency=False)
    add_sampling_flags(parser)
    add_retrieval_flags(parser)
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
    if args.max_batch_size < 1:
        raise ValueError(f"--max_batch_size: found {args.max_batch_size}, expected at least 1")
    if args.api_base and args.compare_models:
        raise ValueError("--api_base and --compare_models: an endpoint's own models are compared")
    check_endpoint_flags(args)
    check_serving_flags(args)
    check_retrieval_flags(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_address(args.host, args.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Ctrl-C: the files of sessions go
    with tempfile.TemporaryDirectory(prefix="suwen-page-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        serve(args, folder)


def serve(args: argparse.Namespace, folder: str) -> None:
    from suwen.page.feedback import Feedback

    feedback, knowledge = Feedback(args.feedback_file), load_knowledge(args)

    from starlette.middleware import Middleware

    from suwen.api.guard import Guard
    from suwen.chat_models import load_chat_models
    from suwen.page.layout import CSS, build_page, theme
    from suwen.page.page import Page
    from suwen.page.texts import translator

    translate, i18n = translator(args.language)
    models = load_chat_models(args)
    page = Page(
        models=models,
        settings=generation_settings(args),
        system_prompt=args.system_prompt,
        language=args.language,
        translate=translate,
        feedback=feedback,
        knowledge=knowledge,
        retrieval=retrieval_settings(args),
        folder=folder,
        at_once=args.max_batch_size,
    )
    blocks: Any = build_page(page)
    try:
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=UPLOAD_SIZE,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Guard, body_bytes=REQUEST_BYTES, authorised=lambda header: True)]},
            theme=theme(),
            css=CSS,
            i18n=i18n,
        )
        say(f"page: http://{args.host}:{args.port}, models: {', '.join(models)}")
        blocks.block_thread()
    finally:
        for model in models.values():
            model.close()


if __name__ == "__main__":
    run(main)
