"""The memory planner against measured peaks: real training steps of tiny models, every allocation counted.

    python benchmarks/memory_plan.py --set all

On the CPU torch's profiler reports every allocation and release of its allocator; their running sum has its peak at the
same moment as a GPU's allocator would. The sets: `fitted` was looked at while the planner's arithmetic was written,
`unseen` was run once it was finished, `stages` (DPO, ORPO, reward models) once these had joined it. `scores` was looked
at while attention that keeps something for all pairs of tokens (Bloom, Baichuan-13B, ChatGLM-6B) was counted; `fresh`,
other sizes and families, was run once after all that: its first point in 8 bits showed that bitsandbytes keeps the
inputs of its layers, and was 13 % off before that was counted; the two others in 8 bits came after it.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.arguments import OddsRatioArguments, PreferenceArguments, RewardArguments
from suwen.command_line import build_parser, flag, run, split_dataclasses


@dataclass(frozen=True)
class Point:
    """One training run: the model's shape and the setting."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tokens: int
    batch: int
    method: str  # full, lora, lora8 or lora4
    checkpointing: bool = False
    bf16: bool = False
    accumulation: int = 1
    rank: int = 8
    stage: str = "sft"
    family: str = "llama"  # a model type
    tied: bool = False


_FIRST = (256, 704, 4, 4, 2, 2000, 256, 2)
FITTED = [Point(*_FIRST, method, ck, bf) for method in ("full", "lora") for bf in (False, True) for ck in (False, True)]
FITTED += [  # wide models, where the layers and not the loss head decide
    Point(1536, 4096, 2, 12, 12, 500, 512, 1, "full", checkpointing=True, accumulation=2),
    Point(2048, 5632, 2, 16, 16, 500, 512, 2, "lora", checkpointing=True),
    Point(1024, 2816, 2, 16, 16, 500, 512, 1, "full"),
    Point(512, 1408, 4, 8, 2, 1000, 256, 2, "lora4", rank=16),
]
UNSEEN = [
    Point(512, 1408, 6, 8, 8, 1000, 384, 3, "full"),
    Point(384, 1024, 8, 6, 3, 4000, 512, 2, "full", bf16=True),
    Point(512, 1408, 8, 8, 2, 1000, 512, 4, "full", checkpointing=True, accumulation=2),
    Point(384, 1536, 6, 6, 6, 3000, 256, 4, "full", checkpointing=True, bf16=True, accumulation=2),
    Point(512, 1408, 6, 8, 2, 1500, 384, 2, "lora", accumulation=2, rank=16),
    Point(256, 768, 6, 4, 2, 1000, 256, 2, "lora", bf16=True),
    Point(512, 2048, 12, 8, 8, 1000, 512, 4, "lora", checkpointing=True),
    Point(384, 1024, 6, 6, 2, 1200, 384, 2, "lora4", checkpointing=True),
    Point(768, 2048, 4, 12, 4, 800, 256, 2, "lora4", rank=4),
    Point(1280, 3456, 3, 10, 5, 500, 384, 2, "full", checkpointing=True, accumulation=2),
    Point(2048, 6144, 3, 16, 4, 500, 384, 2, "lora", checkpointing=True),
    Point(1280, 3456, 2, 10, 10, 500, 256, 1, "full"),
]
STAGES = [
    Point(512, 1408, 6, 8, 8, 1000, 192, 2, "full", stage="dpo"),
    Point(384, 1024, 6, 6, 2, 2000, 256, 1, "lora", checkpointing=True, accumulation=2, stage="dpo"),
    Point(512, 1408, 4, 8, 2, 3000, 192, 2, "full", checkpointing=True, accumulation=2, stage="orpo"),
    Point(384, 1024, 6, 6, 2, 1000, 256, 2, "lora", stage="orpo"),
    Point(512, 1408, 4, 8, 2, 3000, 192, 2, "full", stage="rm"),
    Point(768, 2048, 4, 12, 4, 1000, 192, 2, "lora", stage="rm"),
]
SCORES = [
    Point(256, 1024, 4, 8, 8, 1000, 512, 1, "full", family="bloom"),
    Point(256, 1024, 4, 8, 8, 1000, 512, 2, "lora", checkpointing=True, family="bloom"),
    Point(256, 704, 4, 8, 8, 1000, 512, 2, "full", family="baichuan"),
    Point(256, 704, 4, 8, 8, 1000, 512, 1, "lora", checkpointing=True, family="baichuan"),
    Point(256, 1024, 4, 8, 8, 1000, 512, 2, "lora", family="chatglm"),
]
FRESH = [
    Point(640, 1728, 5, 10, 2, 6000, 320, 2, "full", family="qwen2"),
    Point(448, 1216, 7, 7, 1, 9000, 448, 1, "lora", checkpointing=True, tied=True, family="qwen2"),
    Point(320, 896, 9, 5, 5, 2500, 288, 3, "full", checkpointing=True, accumulation=2, family="qwen3"),
    Point(576, 1536, 5, 9, 3, 1700, 352, 2, "lora", tied=True, rank=32, family="gemma"),
    Point(704, 1856, 4, 11, 1, 3500, 224, 2, "lora4", accumulation=2, family="mistral"),
    Point(576, 1600, 5, 9, 9, 2200, 416, 1, "lora8", family="qwen2"),
    Point(448, 1216, 6, 7, 7, 1500, 384, 2, "lora8", checkpointing=True),
    Point(704, 1856, 3, 11, 11, 1200, 256, 2, "lora8", accumulation=2, family="qwen3"),
    Point(320, 1280, 5, 10, 10, 4000, 640, 1, "full", checkpointing=True, accumulation=2, family="bloom"),
    Point(384, 1536, 3, 6, 6, 700, 320, 3, "lora", family="bloom"),
    Point(320, 832, 6, 10, 10, 3000, 704, 1, "lora", family="baichuan"),
    Point(448, 1152, 3, 14, 14, 1500, 384, 2, "full", checkpointing=True, family="baichuan"),
    Point(384, 1536, 5, 6, 6, 2000, 448, 2, "full", family="chatglm"),
    Point(512, 1280, 5, 8, 4, 4500, 160, 2, "lora", stage="rm", checkpointing=True, tied=True, family="qwen2"),
]


def build_rows(point: Point) -> list[dict[str, Any]]:
    """Rows of random tokens, all of the point's length; pairs are two answers to a prompt of eight tokens.

    Every second row that will be padded is a little shorter: without any padding the mask would be left out.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    count = 2 * point.batch * point.accumulation
    paired = point.stage != "sft"
    tokens = 2 * point.tokens if paired else point.tokens
    rows = torch.randint(5, min(point.vocabulary, 500), (count, tokens), generator=generator).tolist()
    if not paired:
        short = 8 if padded(point) else 0
        rows = [row[: len(row) - short * (i % 2)] for i, row in enumerate(rows)]
        return [{"input_ids": row, "labels": row} for row in rows]
    middle = point.tokens + 4
    return [{"prompt_ids": row[:8], "chosen_ids": row[8:middle], "rejected_ids": row[middle:]} for row in rows]


def padded(point: Point) -> bool:
    return point.family in ("bloom", "chatglm")


def measure(point: Point, device: str = "cpu") -> int:
    """Peak of the allocator's live bytes over two optimiser steps, from before the model was built."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.profiler import ProfilerActivity, profile
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainingArguments,
    )

    from suwen import attention
    from suwen.embedded import build_embedded_model
    from suwen.head import add_reward_forward, add_scoring_head
    from suwen.lora_targets import lora_targets
    from suwen.models import load_base
    from suwen.trainers import LanguageModelTrainer, OddsRatioTrainer, PairTrainer, RewardTrainer

    trainers = {"sft": LanguageModelTrainer, "dpo": PairTrainer, "orpo": OddsRatioTrainer, "rm": RewardTrainer}
    tokenizer = AutoTokenizer.from_pretrained(build_embedded_model())
    dataset = Dataset.from_list(build_rows(point))
    reward = point.stage == "rm"
    build: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model: Any = build.from_config(config_of(point))
        lora = None
        if point.method != "full":
            lora = LoraConfig(
                r=point.rank, lora_alpha=16, lora_dropout=0.05, task_type="SEQ_CLS" if reward else "CAUSAL_LM",
                target_modules=lora_targets(model, "all"),
            )  # fmt: skip
        if point.bf16 and lora is not None:
            model = model.to(torch.bfloat16)
        if bits := BITS.get(point.method):
            model.save_pretrained(folder + "/base")
        config = TrainingArguments(
            output_dir=folder, use_cpu=device == "cpu", bf16=point.bf16, report_to=[], max_steps=2,
            per_device_train_batch_size=point.batch, gradient_accumulation_steps=point.accumulation,
            gradient_checkpointing=point.checkpointing, save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        counting: Any = (
            nullcontext() if device == "cuda" else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        )
        with counting as profiler:
            if bits:
                compute = torch.bfloat16 if point.bf16 else torch.float32
                model = load_base(folder + "/base", "auto", bits, compute, device)
                for parameter in model.parameters():  # what is not quantised keeps the whole file mapped: no allocation
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.clone()
            else:
                model = build.from_config(config_of(point))
                model = model.to(torch.bfloat16) if point.bf16 and lora is not None else model
            (add_reward_forward if reward else add_scoring_head)(model)
            if not padded(point) and point.family != "baichuan":
                model.set_attn_implementation(attention.NAME)
            options = {} if point.stage == "sft" else {"settings": SETTINGS[point.stage]}
            trainer = trainers[point.stage](
                model=model, args=config, train_dataset=dataset, eval_dataset=None, processing_class=tokenizer,
                max_length=point.tokens, peft_config=lora, packing=not padded(point), padding=padded(point), **options,
            )  # fmt: skip
            if point.stage == "dpo":
                trainer.compute_reference(Path(folder), "benchmark")
            trainer.train()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def config_of(point: Point) -> Any:
    from transformers import CONFIG_MAPPING

    import suwen.architectures  # noqa: F401  (registers its classes)

    values = {
        "vocab_size": point.vocabulary, "hidden_size": point.hidden, "intermediate_size": point.inner,
        "num_labels": 1, "pad_token_id": 0, "num_hidden_layers": point.layers, "num_attention_heads": point.heads,
        "num_key_value_heads": point.key_value_heads, "tie_word_embeddings": point.tied,
    }  # fmt: skip
    if point.family == "chatglm":
        values |= {"inner_hidden_size": values.pop("intermediate_size"), "max_sequence_length": 2 * point.tokens}
        values |= {"bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 1, "gmask_token_id": 4}
    elif point.family == "baichuan":
        values["model_max_length"] = 2 * point.tokens
    else:
        values["max_position_embeddings"] = 2 * point.tokens
    if point.family in ("qwen3", "gemma"):  # whose heads have a width of their own
        values["head_dim"] = point.hidden // point.heads
    return CONFIG_MAPPING[point.family](**values)


def predict(point: Point, device: str = "cpu") -> float:
    """What the plan says of it; of a GPU without what its allocator does not hand out."""
    from suwen.memory import Setting, plan_memory, shape_of

    setting = Setting(
        stage=point.stage,
        lora_dropout=0.0 if point.stage in ("dpo", "orpo") else 0.05,  # these switch dropout off
        use_peft=point.method != "full",
        lora_rank=point.rank,
        quantization=BITS.get(point.method, "none"),
        precision="bf16" if point.bf16 else "fp32",
        tokens=point.tokens,
        batch=point.batch,
        gradient_accumulation_steps=point.accumulation,
        gradient_checkpointing=point.checkpointing,
        device=device,
        trained_share=(point.tokens - 1) / point.tokens,
    )
    plan = plan_memory(shape_of(config_of(point)), setting)
    return sum(size for name, size in plan.parts.items() if name not in ("CUDA context", "fragmentation allowance"))


BITS = {"lora8": "8bit", "lora4": "4bit"}
SETTINGS = {"dpo": PreferenceArguments(), "orpo": OddsRatioArguments(), "rm": RewardArguments()}


@dataclass
class BenchmarkArguments:
    set: Literal["fitted", "unseen", "stages", "scores", "fresh", "all"] = flag("all", "which part of the grid")


def main(argv: list[str] | None = None) -> None:
    (args,) = split_dataclasses(build_parser(__doc__ or "", BenchmarkArguments).parse_args(argv), BenchmarkArguments)
    from suwen.stage import quiet_libraries

    quiet_libraries()
    groups = {"fitted": FITTED, "unseen": UNSEEN, "stages": STAGES, "scores": SCORES, "fresh": FRESH}
    print(
        "set     stage family   method precision   h    f  layers  heads   V    tokens   checkpointing accumulation"
        "  planned  measured"
    )
    for name, points in groups.items():
        if args.set not in (name, "all"):
            continue
        worst = 0.0
        for point in points:
            planned, measured = predict(point), measure(point)
            off = planned / measured - 1
            worst = max(worst, abs(off))
            model = (
                f"{point.hidden:>5} {point.inner:>5} {point.layers:>4}   {point.heads:>2}/{point.key_value_heads:<2}"
            )
            steps = f"{point.batch:>3}x{point.tokens:<5} {'yes' if point.checkpointing else 'no':>7}"
            print(
                f"{name:<7} {point.stage:<5} {point.family:<8} {point.method:<6} "
                f"{'bf16' if point.bf16 else 'fp32':<7} {model} {point.vocabulary:>6} "
                f"{steps} {point.accumulation:>12} {planned / 1e6:>10.1f} {measured / 1e6:>8.1f} MB {off:+7.1%}",
                flush=True,
            )
        print(f"{name}: largest deviation {worst:.1%}")


if __name__ == "__main__":
    run(main)
