"""Will it fit? The memory of a training step, part by part, before anything is downloaded or launched.

    python tools/plan_memory.py --model_name_or_path models/Qwen3-8B --stage sft --use_peft True --max_length 2048 \\
        --gpu_memory 24
    python tools/plan_memory.py --model_name_or_path 70B --num_gpus 8 --sharding zero3
    python tools/plan_memory.py --table True

The model is a folder, a config.json, a hub name or one of 7B, 13B, 30B, 70B, 110B, 8x7B, 8x22B, LLaMA3-8B, Qwen2.5-7B,
Qwen3-8B, Baichuan-13B, Baichuan2-13B, BLOOMZ-7B1, ChatGLM-6B; its config alone is read. With --gpu_memory it says what
fits: the largest batch, or the cheapest change of flags.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses
from suwen.conversion import FamilyName


@dataclass
class PlanArguments:
    model_name_or_path: str = flag("", "model folder, config.json, hub name, or a size such as 7B or 8x7B")
    family: FamilyName | None = flag(None, "family of an original that its config.json does not tell")
    gpu_memory: float | None = flag(None, "memory of one card in GB; unset: the plan alone")
    table: bool = flag(False, "the table of methods and sizes, instead of one plan")
    stage: Literal["pt", "sft", "dpo", "rm", "orpo", "ppo"] = flag("sft", "training stage")
    use_peft: bool = flag(False, "LoRA")
    lora_rank: int = flag(8, "rank of the adapter")
    lora_dropout: float = flag(0.05, "dropout before the adapter")
    quantization: Literal["none", "8bit", "4bit", "2bit"] = flag("none", "of the frozen base, with --use_peft")
    precision: Literal["bf16", "fp16", "fp32"] = flag("bf16", "of the arithmetic")
    pure_bf16: bool = flag(False, "bfloat16 weights without float32 masters")
    max_length: int = flag(1024, "tokens in a sequence")
    per_device_train_batch_size: int = flag(1, "sequences in a micro-batch; pairs in DPO, ORPO and RM")
    generation_batch_size: int = flag(32, "answers drawn at once (PPO)")
    reward_model: str | None = flag(None, "reward model beside the policy, as --model_name_or_path (PPO)")
    target_modules: str = flag("all", "what LoRA adapts")
    gradient_accumulation_steps: int = flag(8, "micro-batches in an optimiser step")
    gradient_checkpointing: bool = flag(True, "recompute activations")
    optim: str = flag("adamw_torch", "adamw_torch, adamw_bnb_8bit or sgd")
    sharding: Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = flag("none", "between the GPUs")
    num_gpus: int = flag(1, "cards")
    offload: bool = flag(False, "CONFIG=zero..._offload: the optimizer in main memory, under zero3 the weights too")
    device: Literal["cuda", "cpu"] = flag("cuda", "where the training runs")


# The seeds' table (MedicalGPT's, from LLaMA-Factory): GB for each method, in the order of the sizes
SIZES = ("7B", "13B", "30B", "70B", "110B", "8x7B", "8x22B")
PUBLISHED = {
    "full, AMP": (120, 240, 600, 1200, 2000, 900, 2400),
    "full, 16 bit": (60, 120, 300, 600, 900, 400, 1200),
    "LoRA, 16 bit": (16, 32, 64, 160, 240, 120, 320),
    "QLoRA, 8 bit": (10, 20, 40, 80, 140, 60, 160),
    "QLoRA, 4 bit": (6, 12, 24, 48, 72, 30, 96),
    "QLoRA, 2 bit": (4, 8, 16, 24, 48, 18, 48),
}
METHODS: dict[str, dict[str, Any]] = {
    "full, AMP": {},
    "full, 16 bit": {"pure_bf16": True},
    "LoRA, 16 bit": {"use_peft": True},
    "QLoRA, 8 bit": {"use_peft": True, "quantization": "8bit"},
    "QLoRA, 4 bit": {"use_peft": True, "quantization": "4bit"},
    "QLoRA, 2 bit": {"use_peft": True, "quantization": "2bit"},
}


def load_config(name: str, family_name: str | None = None) -> Any:
    """Config of a size by its name, of a model, or of what an original would be converted to."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    import suwen.architectures  # noqa: F401  (registers its classes)
    from suwen.conversion.configs import load_native
    from suwen.conversion.convert import conversion_command
    from suwen.conversion.families import FAMILIES, convert_config, recognise
    from suwen.conversion.weights import read_json
    from suwen.lineage import needs_code
    from suwen.memory import SIZES as NAMED
    from suwen.network import ask_hub

    sizes = {size.lower(): values for size, values in NAMED.items()}
    if (named := sizes.get(name.lower())) is not None:
        return CONFIG_MAPPING[named["model_type"]](**{key: named[key] for key in named if key != "model_type"})
    path = Path(name)
    if not path.exists() and name.count("/") != 1:  # no hub name: nothing to wait for a network for
        raise ValueError(
            f"--model_name_or_path {name}: found no such folder or file, expected one, a hub name such as "
            f"Qwen/Qwen3-8B, or one of {', '.join(NAMED)}"
        )
    if not path.exists():
        ask_hub()
    content = read_json(path if path.is_file() else path / "config.json")
    try:
        content = content or PreTrainedConfig.get_config_dict(name)[0]  # of a hub name: what AutoConfig would fetch
        original = conversion_command(content, name)
        if not original and (why := needs_code(content, name)):
            raise ValueError(why)
        if not original:
            return load_native(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--model_name_or_path {name}: {reason}; expected a model or one of {', '.join(NAMED)}"
        ) from None
    family = FAMILIES[family_name] if family_name else recognise(content)
    assert family is not None
    return convert_config(family, content)


def print_table(common: dict[str, Any]) -> None:
    from suwen.memory import Setting, plan_memory, shape_of

    shapes = [shape_of(load_config(size)) for size in SIZES]
    print("GB for all cards together, planned (published in MedicalGPT's README)")
    print(f"{'':<14}" + "".join(f"{size:>14}" for size in SIZES))
    for method, options in METHODS.items():
        cells = []
        for shape, published in zip(shapes, PUBLISHED[method], strict=True):
            plan = plan_memory(shape, Setting(**common | options))
            cells.append(f"{plan.total / 1e9:,.0f} ({published:,})".rjust(14))
        print(f"{method:<14}" + "".join(cells))
    print(
        f"assumed: one process, {common['batch']} x {common['tokens']} tokens, bf16, gradient checkpointing "
        f"{'on' if common['gradient_checkpointing'] else 'off'}, AdamW, LoRA rank {common['lora_rank']} on all linear "
        "layers; 8x7B and 8x22B keep their experts in 16 bits under bitsandbytes, which the published figures do not"
    )


def main(argv: list[str] | None = None) -> None:
    (args,) = split_dataclasses(build_parser(__doc__ or "", PlanArguments).parse_args(argv), PlanArguments)
    if not args.model_name_or_path and not args.table:
        raise ValueError("--model_name_or_path: found nothing, expected a model or a size such as 7B")
    if args.quantization != "none" and not args.use_peft and not args.table:
        raise ValueError(
            f"--quantization {args.quantization}: quantised weights cannot be trained, add --use_peft True"
        )
    for name in (
        "max_length",
        "per_device_train_batch_size",
        "num_gpus",
        "lora_rank",
        "gradient_accumulation_steps",
        "generation_batch_size",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: found {getattr(args, name)}, expected at least 1")
    if args.gpu_memory is not None and args.gpu_memory <= 0:
        raise ValueError(f"--gpu_memory: found {args.gpu_memory:g}, expected GB of one card, such as 24")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from suwen.memory import Setting, advise, describe, frozen_bytes, plan_memory, refuse_divided, shape_of

    refuse_divided(args.quantization, args.sharding)
    names = {field.name for field in dataclasses.fields(Setting)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values |= {"tokens": args.max_length, "batch": args.per_device_train_batch_size}
    values["offload_weights"] = args.offload and args.sharding == "zero3"  # as in configs/zero3_offload.json
    if args.table:
        print_table(values | {"gradient_accumulation_steps": 1, "quantization": "none", "use_peft": False})
        return
    values["generation_batch"] = args.generation_batch_size
    if args.reward_model and args.stage == "ppo":
        reward = Setting(use_peft=True, precision=args.precision)
        values["reward_bytes"] = frozen_bytes(shape_of(load_config(args.reward_model)), reward)[0]
    shape, setting = shape_of(load_config(args.model_name_or_path, args.family), args.target_modules), Setting(**values)
    plan = plan_memory(shape, setting)
    print(f"{args.model_name_or_path}: {shape.total / 1e9:.2f} billion parameters in {shape.layers} layers")
    print("\n".join(describe(plan)))
    if args.gpu_memory:
        print(advise(shape, setting, args.gpu_memory * 1e9))


if __name__ == "__main__":
    run(main)
