"""What the serving entry points share: their flags, and how these become a model with its encoder.

The upper half is the standard library only, so that --help and mistakes in flags are answered before torch loads.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suwen.command_line import OneLineParser
from suwen.generation_settings import GenerationSettings
from suwen.switching import Chains, find_base, load_adapters, named_folders

if TYPE_CHECKING:
    from suwen.encoding import ChatEncoder

THINKING = {"auto": None, "on": True, "off": False}


class Removed(argparse.Action):
    """An old flag without an equivalent: refused with what to do instead."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is not available: {self.const}")


def serving_parser(description: str) -> OneLineParser:
    return OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_removed_flags(parser: argparse.ArgumentParser, removed: dict[str, str]) -> None:
    for name, reason in removed.items():
        parser.add_argument(f"--{name}", action=Removed, nargs="*", const=reason, help=argparse.SUPPRESS)


def add_model_flags(parser: argparse.ArgumentParser, switchable: bool = False) -> None:
    """The flags that name a model; `switchable`: adapters are chosen by name, instead of put on in order."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--base_model",
        "--model_name_or_path",
        metavar="PATH",
        help="model folder, hub name or LoRA folder (default: newest stage in outputs/, else the embedded model)",
    )
    if switchable:
        group.add_argument(
            "--lora_model",
            nargs="+",
            metavar="[NAME=]DIR",
            help="LoRA folders of one base, each chosen by its name (default: that of its folder)",
        )
    else:
        group.add_argument(
            "--lora_model",
            metavar="DIR[,DIR]",
            help="LoRA folders put on the model in this order (a LoRA folder's own base is found without --base_model)",
        )
    group.add_argument(
        "--tokenizer_path", "--tokenizer_name_or_path", metavar="PATH", help="tokenizer (default: the model's own)"
    )
    group.add_argument(
        "--template_name", default="auto", metavar="NAME", help="prompt template (default: auto, the tokenizer's own)"
    )
    group.add_argument(
        "--quantization",
        choices=("none", "8bit", "4bit", "2bit"),
        default="none",
        help="8 and 4 bit by bitsandbytes (default: none)",
    )
    group.add_argument(
        "--dtype",
        "--torch_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="weights in memory (default: auto, 16 bit on a GPU, float32 on the CPU)",
    )
    group.add_argument("--use_cpu", "--only_cpu", action="store_true", help="the CPU even where there is a GPU")
    group.add_argument("--gpus", metavar="0,1", help="GPUs to see, by number (sets CUDA_VISIBLE_DEVICES)")
    for width in ("4bit", "8bit"):
        group.add_argument(
            f"--load_in_{width}", action="store_const", dest="quantization", const=width, help=argparse.SUPPRESS
        )
    add_removed_flags(
        parser,
        {
            "resize_emb": "an adapter that carries a larger vocabulary grows the model by itself",
            "trust_remote_code": "code from a model folder never runs; convert the checkpoint to a native class",
            "stop_str": "an answer ends at the template's own stop token; choose the template by --template_name",
        },
    )


def add_endpoint_flags(parser: argparse.ArgumentParser, concurrency: bool = True) -> None:
    group = parser.add_argument_group("an endpoint instead of a model (key: OPENAI_API_KEY)")
    group.add_argument("--api_base", metavar="URL", help="OpenAI-compatible, such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", metavar="NAME", help="the model's name there")
    if concurrency:
        group.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")


def check_endpoint_flags(args: argparse.Namespace) -> None:
    if args.api_base and (args.base_model or args.lora_model):
        raise ValueError("--api_base and --base_model: give one of them")
    if args.model and not args.api_base:
        raise ValueError("--model: names a model of an endpoint; needs --api_base")
    if getattr(args, "concurrency", 1) < 1:
        raise ValueError(f"--concurrency: found {args.concurrency}, expected at least 1")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--system_prompt", default="", metavar="TEXT", help="system prompt (default: none)")
    group.add_argument(
        "--thinking",
        choices=tuple(THINKING),
        default="auto",
        help="thinking, where the template can (default: auto, as trained)",
    )
    group.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 always takes the likeliest token, so the same question gets the same answer; 0.7 varies (default: 0)",
    )
    group.add_argument(
        "--top_p", type=float, default=0.9, metavar="X", help="nucleus, with temperature > 0 (default: 0.9)"
    )
    group.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="so many likeliest tokens; 0: all (default: 0)"
    )
    group.add_argument(
        "--repetition_penalty", type=float, default=1.0, metavar="X", help="above 1 against repetition (default: 1)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same draws each time, where temperature > 0")


def check_serving_flags(args: argparse.Namespace) -> None:
    """Refuse what can be seen without loading anything, and choose the GPUs while torch has not looked at them yet."""
    from template import get_template

    if args.template_name != "auto":
        get_template(args.template_name)
    generation_settings(args)
    for name in ("base_model", "tokenizer_path"):
        value = getattr(args, name)
        if value is not None and not value.strip():
            raise ValueError(f"--{name}: found nothing, expected a folder or a hub name")
        if value is not None and value.startswith((".", "/", "~")) and not Path(value).is_dir():
            raise ValueError(f"--{name} {value}: found no such folder, expected a folder or a hub name")
    if isinstance(args.lora_model, list):
        named_folders(args.lora_model)
    for adapter in adapter_folders(args):
        if not (Path(adapter) / "adapter_config.json").is_file():
            found = "no adapter_config.json there" if Path(adapter).is_dir() else "no such folder"
            raise ValueError(f"--lora_model {adapter}: found {found}, expected a LoRA folder")
    if args.gpus is not None:
        if args.use_cpu:
            raise ValueError("--gpus and --use_cpu: give one of them")
        if not all(part.strip().isdigit() for part in args.gpus.split(",")):
            raise ValueError(f"--gpus {args.gpus}: expected GPU numbers such as 0 or 0,1")
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpus.replace(" ", "")
    if args.use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def adapter_folders(args: argparse.Namespace) -> list[str]:
    if isinstance(args.lora_model, list):
        return []  # chosen by name, see load_switchable
    return [part.strip() for part in (args.lora_model or "").split(",") if part.strip()]


def generation_settings(args: argparse.Namespace) -> GenerationSettings:
    return GenerationSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


@dataclass(frozen=True)
class Served:
    """A model ready to answer."""

    model: Any
    encoder: ChatEncoder
    names: list[str]  # what it was put together from, base first
    window: int | None  # tokens


def load_served(args: argparse.Namespace) -> Served:
    """Load what the model flags name, and say on stderr what that is."""
    import torch

    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    if device == "cuda":  # of several processes that answer together, each has its own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    from transformers.utils import logging

    from suwen.encoding import ChatEncoder
    from suwen.generation import model_window
    from suwen.models import check_vocabulary, load_causal_lm, load_tokenizer
    from suwen.progress import quiet_libraries

    quiet_libraries()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.gpus is not None and torch.cuda.device_count() < len(args.gpus.split(",")):
        raise ValueError(f"--gpus {args.gpus}: found {torch.cuda.device_count()} usable GPUs")
    dtype = args.dtype
    if dtype == "auto":
        half = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        dtype = half if device == "cuda" else "float32"
    adapters = adapter_folders(args)
    base = args.base_model or (None if adapters else find_default_model())
    try:
        if adapters:
            model, names = load_with_adapters(base, adapters, dtype, args.quantization, device)
        else:
            assert base is not None
            model, names = load_causal_lm(base, dtype, args.quantization, device), [base]
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{base or adapters[0]}: does not fit into the GPU's memory; try --quantization 4bit or --use_cpu"
        ) from None
    tokenizer = load_tokenizer(args.tokenizer_path or tokenizer_folder(names), args.template_name)
    check_vocabulary(model, tokenizer)
    model.eval()
    say(f"model: {' + '.join(names)} ({device}, {dtype if args.quantization == 'none' else args.quantization})")
    thinking = trained_thinking(names[-1]) if args.thinking == "auto" else args.thinking
    return Served(model, ChatEncoder(tokenizer, THINKING[thinking]), names, model_window(model))


@dataclass(frozen=True)
class Switchable:
    """A base, and adapters that are chosen by name for each answer."""

    model: Any
    base: str
    encoder: ChatEncoder
    folders: dict[str, str]
    chains: Chains
    encoders: dict[str, ChatEncoder]  # of each adapter: its own tokenizer, template and thinking mode


def load_switchable(args: argparse.Namespace) -> Switchable:
    """Load the base, and every adapter of --lora_model once on top of it."""
    folders = named_folders(args.lora_model or [])
    if not folders:
        served = load_served(argparse.Namespace(**{**vars(args), "lora_model": None}))
        return Switchable(served.model, served.names[-1], served.encoder, {}, {}, {})
    base, lineage = find_base(args.base_model, folders)
    served = load_served(argparse.Namespace(**{**vars(args), "base_model": base, "lora_model": None}))
    from suwen.encoding import ChatEncoder
    from suwen.models import check_vocabulary, load_tokenizer

    model, chains = load_adapters(served.model, lineage)
    encoders = {}
    for name, chain in lineage.items():
        tokenizer = load_tokenizer(args.tokenizer_path or tokenizer_folder([base, *chain]), args.template_name)
        check_vocabulary(model, tokenizer)
        thinking = trained_thinking(chain[-1]) if args.thinking == "auto" else args.thinking
        encoders[name] = ChatEncoder(tokenizer, THINKING[thinking])
    return Switchable(model, base, served.encoder, folders, chains, encoders)


def trained_thinking(path: str) -> str:
    """The thinking mode of the prompts that a model was trained on, where its folder says so and they all had one."""
    from suwen.lineage import read_json

    for record in ("run.json", "merge.json"):
        if (mode := read_json(Path(path) / record).get("thinking")) in ("on", "off"):
            return mode
    return "auto"


def find_default_model() -> str:
    """The newest finished stage, else the embedded model."""
    from suwen.lineage import find_finished_stage

    if (stage := find_finished_stage() or find_finished_stage("outputs/pipeline")) is not None:
        say(f"no --base_model: the newest finished stage, {stage}")
        return stage
    from suwen.embedded import build_embedded_model

    folder = str(build_embedded_model())
    say(f"no --base_model and no finished stage in outputs/: the embedded model, {folder}")
    return folder


def load_with_adapters(
    base: str | None, adapters: list[str], dtype: str, quantization: str, device: str
) -> tuple[Any, list[str]]:
    """Merge LoRA folders in order, in float32; on a quantised base one stays on top, as merging would round it away.

    Returns:
        the model, and the folders that it was put together from, base first.

    Raises:
        ValueError: a folder that holds no adapter, or an adapter that was not trained on what is under it.
    """
    import torch

    from suwen.merging import plan_merge
    from suwen.models import config_of_lineage, load_adapter, load_base, load_merged

    plan = plan_merge(base, adapters)
    names = [plan.base, *plan.adapters]
    if plan.quantization not in ("none", quantization):
        say(f"note: {names[-1]} was trained with --quantization {plan.quantization}, which serves it as trained")
    if quantization == "none":
        return load_merged(plan.base, plan.adapters, dtype, device), names
    if len(plan.adapters) > 1:
        raise ValueError(
            f"--quantization {quantization}: one adapter fits a quantised model, found {', '.join(plan.adapters)};"
            " merge them with merge_peft_adapter.py first"
        )
    config = config_of_lineage(plan.base, plan.adapters)
    model = load_base(plan.base, getattr(torch, dtype), quantization, getattr(torch, dtype), device, config=config)
    return load_adapter(model, plan.adapters[0]), names


def tokenizer_folder(names: list[str]) -> str:
    """The last of a model's folders that brings a tokenizer."""
    brings = [name for name in names if (Path(name) / "tokenizer_config.json").is_file()]
    return brings[-1] if brings else names[0]


def say(line: str) -> None:
    """Status goes to stderr, so that stdout holds answers only."""
    print(line, file=sys.stderr, flush=True)
