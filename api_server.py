"""Serve a model to programs that speak OpenAI's API.

    python api_server.py --base_model outputs/sft-merged
    python api_server.py --base_model Qwen/Qwen3-8B --lora_model sft=outputs/sft dpo=outputs/dpo --port 8000

    from openai import OpenAI
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="sft", messages=[...])

Endpoints: /v1/chat/completions and /v1/completions (also streamed), /v1/models, /health. Requests that come together
are answered together. Each LoRA folder is a model name of its own beside the base's. The server listens to this
machine only; any other --host needs --api_key. Without --base_model the newest finished stage in outputs/ answers,
else the embedded model. The answers are research output, not medical advice.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from suwen.command_line import run
from suwen.network import check_address, is_loopback
from suwen.retrieval.flags import add_retrieval_flags, check_retrieval_flags, load_knowledge
from suwen.serving import (
    add_model_flags,
    add_removed_flags,
    add_sampling_flags,
    check_serving_flags,
    generation_settings,
    load_switchable,
    say,
    serving_parser,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = serving_parser(__doc__ or "")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    group.add_argument(
        "--api_key", metavar="KEY", help="what clients must send (default: SUWEN_API_KEY, which no process list shows)"
    )
    group.add_argument("--served_model_name", metavar="NAME", help="the base's name (default: that of its folder)")
    group.add_argument(
        "--max_batch_size", type=int, default=8, metavar="N", help="requests answered together (default: 8)"
    )
    group.add_argument(
        "--max_waiting", type=int, default=64, metavar="N", help="requests that may wait; more get 429 (default: 64)"
    )
    group.add_argument(
        "--max_body_bytes", type=int, default=1 << 20, metavar="N", help="largest request (default: 1 MiB)"
    )
    group.add_argument(
        "--max_answer_tokens", type=int, default=4096, metavar="N", help="most that a client may ask (default: 4096)"
    )
    group.add_argument(
        "--request_seconds", type=float, default=300.0, metavar="X", help="longest time for one request (default: 300)"
    )
    add_model_flags(parser, switchable=True)
    add_sampling_flags(parser)
    add_retrieval_flags(parser)
    add_removed_flags(parser, {"max_length": "use --max_new_tokens; a prompt may fill the model's window"})
    args = parser.parse_args(argv)
    args.api_key = args.api_key or os.environ.get("SUWEN_API_KEY") or None
    for name in ("max_batch_size", "max_body_bytes", "max_answer_tokens", "request_seconds"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name}: found {getattr(args, name)}, expected more than 0")
    if args.max_waiting < 0:
        raise ValueError(f"--max_waiting: found {args.max_waiting}, expected 0 or more")
    if args.max_new_tokens > args.max_answer_tokens:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens}: more than --max_answer_tokens {args.max_answer_tokens}"
        )
    if not is_loopback(args.host) and not args.api_key:
        raise ValueError(f"--host {args.host}: anyone who can reach it could use the model; add --api_key")
    check_serving_flags(args)
    check_retrieval_flags(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_address(args.host, args.port)
    knowledge = load_knowledge(args)
    served = load_switchable(args)

    import uvicorn

    from suwen.api.server import Api, Limits, ServedModel, build_app
    from suwen.batching import Batcher

    name = args.served_model_name or Path(served.base).resolve().name
    if name in served.encoders:
        raise ValueError(f"--lora_model: an adapter and the base are both called {name}; give --served_model_name")
    models = {name: ServedModel(served.encoder, (), served.base)}
    for adapter, encoder in served.encoders.items():
        models[adapter] = ServedModel(encoder, served.chains[adapter], served.folders[adapter])
    batcher = Batcher(served.model, args.max_batch_size, args.max_waiting)
    limits = Limits(args.max_body_bytes, args.max_answer_tokens, args.request_seconds)
    api = Api(batcher, models, generation_settings(args), limits, args.system_prompt, knowledge)
    say(f"API: http://{args.host}:{args.port}/v1, models: {', '.join(models)}")
    uvicorn.run(
        build_app(api, args.api_key),
        host=args.host,
        port=args.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=20,
        timeout_keep_alive=30,
    )


if __name__ == "__main__":
    run(main)
