"""Training speed and memory, side by side with what a user would pick instead.

    python -m benchmarks.training --task sft --rounds 3
    python -m benchmarks.training --task dpo --vocabulary 151936
    python -m benchmarks.training --task rm --method full
    python -m benchmarks.training --suite --rounds 1          # on a GPU: models of 0.5B, 1.5B and 7B, rows of 1k to 8k

Every contender trains the same random model on the same rows, with as many rows an optimiser step, in a process of its
own; rounds alternate between the contenders, and the table gives medians and ratios. `useful` tokens are those of the
rows (for pairs: prompt and both answers, once each); padding and repeated prompts do not count. Row lengths are drawn
like those of medical questions and dialogues: many short answers, a long tail; with --shortest evenly on a logarithmic
scale. On a GPU activations are computed again where the plan says that they do not fit. `of the limit` is the share of
the rate at which this machine multiplies matrices of the model's shapes and nothing else: a useful token counts twice
its parameters forward, as much for the gradient of its input and, where all weights are trained, of those; with the
reference of pairs forward once more in two epochs. What attention multiplies comes on top, and is not counted.

    suwen        this project: packed by best fit, attention by segments, no logits
    trl best     TRL's trainer, checkpointing as suwen does, packed (bfd) for SFT and PT, reference precomputed for DPO
    trl          TRL's trainer with its defaults
    padded       transformers' Trainer on padded batches with checkpointing, as MedicalGPT's scripts run it (SFT, PT)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CONTENDERS = {
    "sft": ["suwen", "trl best", "trl", "padded"],
    "pt": ["suwen", "trl best", "trl", "padded"],
    "dpo": ["suwen", "trl best", "trl"],
    "rm": ["suwen", "trl best", "trl"],
}
PAIRS = ("dpo", "rm")
# width, width of the MLP, layers, heads, key heads; 512 has 25.7 million parameters beside its embedding, the sizes are
# those of Qwen2.5
SHAPES = {
    "256": (256, 768, 8, 4, 2), "512": (512, 1536, 8, 8, 4), "1024": (1024, 3072, 8, 16, 8),
    "0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2), "7B": (3584, 18944, 28, 28, 4),
}  # fmt: skip
ROWS_PER_STEP = 16
SUITE = {"0.5B": 512, "1.5B": 256, "7B": 128}  # shape: rows
SUITE_SETTINGS = {"vocabulary": 151936, "shortest": 1024, "longest": 8192}
LIMIT = "limit"  # beside the contenders


def build_config(vocabulary: int, shape: str) -> Any:
    from transformers import Qwen2Config

    hidden, inner, layers, heads, key_heads = SHAPES[shape]
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=32768,
        tie_word_embeddings=shape != "7B", use_cache=False, num_labels=1, pad_token_id=0,
    )  # fmt: skip


def build_model(task: str, config: Any, dtype: Any, device: str) -> Any:
    """A random model where it will be trained; for reward models under a head of one score."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    build: Any = AutoModelForSequenceClassification if task == "rm" else AutoModelForCausalLM
    with torch.device(device):
        return build.from_config(config, dtype=dtype)


def draw_rows(task: str, count: int, vocabulary: int, longest: int, shortest: int = 0) -> list[dict[str, list[int]]]:
    """Seeded rows of random tokens, of lengths like real ones, or of `shortest` to `longest` tokens."""
    import numpy as np

    random = np.random.default_rng(0)

    def tokens(length: float) -> list[int]:
        return random.integers(10, vocabulary, int(length)).tolist()

    rows = []
    for _ in range(count):
        prompt = tokens(np.clip(random.lognormal(3.7, 0.7), 8, longest // 2))
        answer = tokens(np.clip(random.lognormal(4.7, 0.8), 8, longest - len(prompt)))
        if shortest:
            length = math.exp(random.uniform(math.log(shortest), math.log(longest)))
            prompt, answer = tokens(length / 3), tokens(length * 2 / 3)
        if task in PAIRS:
            prompt = tokens(np.clip(random.lognormal(5.0, 0.6), 16, longest // 2))
            chosen = tokens(np.clip(random.lognormal(4.2, 0.7), 8, longest - len(prompt)))
            rejected = tokens(np.clip(random.lognormal(4.2, 0.7), 8, longest - len(prompt)))
            if shortest:
                length = math.exp(random.uniform(math.log(shortest), math.log(longest)))
                prompt, chosen, rejected = tokens(length / 2), tokens(length / 2), tokens(length / 2)
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        elif task == "pt":
            rows.append({"input_ids": prompt + answer, "labels": prompt + answer})
        else:
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def precision_of(given: argparse.Namespace) -> str:
    from suwen.models import compute_precision

    return compute_precision({}) if given.precision == "auto" else given.precision


def dtype_of(precision: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def needs_checkpointing(given: argparse.Namespace, config: Any) -> bool:
    """On a GPU what the stages' own default takes: activations are computed again where they do not fit."""
    import torch

    from suwen.memory import PAIRED, SAFE_SHARE, Setting, plan_memory, shape_of

    if not torch.cuda.is_available():
        return False
    setting = Setting(
        stage=given.task, use_peft=given.method == "lora", precision=precision_of(given), gradient_checkpointing=False,
        tokens=given.longest // 2 if given.task in PAIRED else given.longest, gradient_accumulation_steps=2,
    )  # fmt: skip
    return plan_memory(shape_of(config), setting).total > SAFE_SHARE * torch.cuda.get_device_properties(0).total_memory


def useful_tokens(rows: list[dict[str, list[int]]]) -> int:
    return sum(len(ids) for row in rows for name, ids in row.items() if name != "labels")


def batch(size: int, rows: int = ROWS_PER_STEP) -> dict[str, int]:
    """Settings for `rows` rows an optimiser step, `size` at a time."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, rows // size)}


def packs(rows: list[dict[str, list[int]]], longest: int) -> dict[str, int]:
    """Settings for as many packs an optimiser step as hold ROWS_PER_STEP rows."""
    return batch(1, ROWS_PER_STEP // max(1, round(longest * len(rows) / useful_tokens(rows))))


def build_ours(given: argparse.Namespace, rows: Any, common: dict[str, Any], made: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    from suwen import attention
    from suwen.arguments import PreferenceArguments, RewardArguments
    from suwen.head import add_reward_forward, add_scoring_head
    from suwen.trainers import LanguageModelTrainer, PairTrainer, RewardTrainer

    (add_reward_forward if given.task == "rm" else add_scoring_head)(made["model"])
    made["model"].set_attn_implementation(attention.NAME)
    trainers: dict[str, Any] = {"dpo": PairTrainer, "rm": RewardTrainer}
    settings: dict[str, Any] = {"dpo": PreferenceArguments, "rm": RewardArguments}
    options = {"settings": settings[given.task]()} if given.task in settings else {}
    args = TrainingArguments(**common, **packs(rows, given.longest))
    trainer = trainers.get(given.task, LanguageModelTrainer)(
        **made, args=args, eval_dataset=None, max_length=given.longest, **options
    )
    if given.task == "dpo":
        trainer.compute_reference(Path(args.output_dir), "")
    return trainer


def build_trl(given: argparse.Namespace, rows: Any, common: dict[str, Any], made: dict[str, Any], best: bool) -> Any:
    import trl
    from datasets import Dataset

    common["gradient_checkpointing"] |= not best
    if given.task not in PAIRS:
        sizes = {"packing": True, **packs(rows, given.longest)} if best else batch(4)
        return trl.SFTTrainer(args=trl.SFTConfig(**common, **sizes, max_length=given.longest), **made)
    cls: Any = trl.RewardTrainer if given.task == "rm" else trl.DPOTrainer

    class Encoded(cls):  # the rows are token ids already
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    if given.task == "dpo":
        config: Any = trl.DPOConfig(**common, **batch(4), max_length=None, precompute_ref_log_probs=best)
    else:
        whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
        made["train_dataset"] = Dataset.from_list(whole)
        config = trl.RewardConfig(**common, **batch(4), max_length=None, center_rewards_coefficient=0.01)
    return Encoded(args=config, **made)


def build_padded(common: dict[str, Any], made: dict[str, Any]) -> Any:
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    common["gradient_checkpointing"] = True
    if (lora := made.pop("peft_config")) is not None:
        made["model"].enable_input_require_grads()
        made["model"] = get_peft_model(made["model"], lora)
    collator = DataCollatorForSeq2Seq(made["processing_class"], label_pad_token_id=-100)
    return Trainer(args=TrainingArguments(**common, **batch(4)), data_collator=collator, **made)


def work(contender: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train one epoch (two for DPO) and say how long it took; runs in a process of its own."""
    began = time.perf_counter()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    from suwen.records import peak_memory_bytes

    precision, config = precision_of(given), build_config(given.vocabulary, given.shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = draw_rows(given.task, given.rows, given.vocabulary, given.longest, given.shortest)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    lora = None
    if given.method == "lora":
        kind = "SEQ_CLS" if given.task == "rm" else "CAUSAL_LM"
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type=kind)
    weights = dtype_of(precision) if lora else torch.float32
    epochs = 2 if given.task == "dpo" else 1
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "report_to": [], "save_strategy": "no", "logging_steps": 10, "seed": 1,
        "learning_rate": 1e-4, "num_train_epochs": epochs, "disable_tqdm": True,
        "use_cpu": device == "cpu", "bf16": precision == "bf16", "fp16": precision == "fp16",
        "gradient_checkpointing": needs_checkpointing(given, config),
    }  # fmt: skip
    made: dict[str, Any] = {
        "model": build_model(given.task, config, weights, device), "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(rows), "peft_config": lora,
    }  # fmt: skip
    marks: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.setdefault("first_step", time.perf_counter() - began)

    start = time.perf_counter()  # packing and a reference pass belong to the training
    if contender == "suwen":
        trainer = build_ours(given, rows, common, made)
    elif contender.startswith("trl"):
        trainer = build_trl(given, rows, common, made, best=contender == "trl best")
    else:
        trainer = build_padded(common, made)
    trainer.add_callback(Clock())
    trainer.train()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": epochs * useful_tokens(rows) / seconds,
        "peak_bytes": peak_memory_bytes(),
        "first_step": marks["first_step"],
        "precision": precision,
    }


def measure_limit(given: argparse.Namespace) -> dict[str, float]:
    """FLOP/s of the model's own products, weighted by their share, and the FLOP that a useful token needs."""
    import torch

    dtype = dtype_of(precision_of(given))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = 10 if device == "cuda" else 1  # to start a product and to hear of its end takes as long as a small one
    model = build_model(given.task, build_config(given.vocabulary, given.shape), dtype, "meta")  # only its shapes
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    flop, seconds = 0.0, 0.0
    for (out, width), count in Counter(shapes).items():
        rows = torch.randn(given.longest, width, dtype=dtype, device=device)
        matrix = torch.randn(width, out, dtype=dtype, device=device)
        times = []
        for _ in range(12):
            began = time.perf_counter()
            for _ in range(repeats):
                rows @ matrix
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / repeats)
        seconds += count * statistics.median(times)
        flop += count * 2 * given.longest * width * out
    passes = (2 if given.method == "lora" else 3) + (0.5 if given.task == "dpo" else 0)
    return {"flop_per_second": flop / seconds, "flop_per_token": passes * flop / given.longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(CONTENDERS), default="sft")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="512", help="width of a small model, or size (512)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--longest", type=int, default=1024, help="tokens in a row, and in a pack")
    parser.add_argument(
        "--shortest", type=int, default=0, help="tokens in a row at least, instead of lengths like real ones"
    )
    parser.add_argument("--suite", action="store_true", help="three sizes of models, one after another, on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="contenders, comma-separated")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    from suwen.check_environment import see_one_gpu

    see_one_gpu()
    if given.worker:
        print("RESULT " + json.dumps(measure_limit(given) if given.worker == LIMIT else work(given.worker, given)))
        return
    if not given.suite:
        compare(given)
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("--suite: found no GPU")
    for shape, rows in SUITE.items():
        compare(argparse.Namespace(**vars(given) | SUITE_SETTINGS | {"shape": shape, "rows": rows}))


def compare(given: argparse.Namespace) -> None:
    """Run the contenders in turn, and print their table."""
    names = [n.strip() for n in given.only.split(",")] if given.only else list(CONTENDERS[given.task])
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    words = [
        f"--{key}={value}" for key, value in vars(given).items() if key not in ("worker", "only", "rounds", "suite")
    ]
    limits: list[dict[str, Any]] = []
    for number in range(given.rounds):
        for name in [*names, LIMIT]:
            command = [sys.executable, "-m", "benchmarks.training", *words, "--worker", name]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{name}: failed\n{done.stderr[-3000:]}", file=sys.stderr)
                continue
            found = json.loads(lines[-1].removeprefix("RESULT "))
            if name == LIMIT:
                limits.append(found)
                continue
            results[name].append(found)
            print(
                f"round {number + 1}  {name:<9} {found['tokens_per_second']:8.0f} tokens/s", file=sys.stderr, flush=True
            )
    print_table(given, results, limits)


def print_table(
    given: argparse.Namespace, results: dict[str, list[dict[str, Any]]], limits: Sequence[dict[str, Any]] = ()
) -> None:
    def middle(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    ours = next((name for name, runs in results.items() if runs), None)
    if ours is None:
        return
    words = f"{given.task}, {given.method}, {given.shape}, vocabulary {given.vocabulary:,}"
    print(f"\n{words}, {results[ours][0]['precision']}\n")
    if limits:
        print(f"limit: {statistics.median(one['flop_per_second'] for one in limits) / 1e9:,.0f} GFLOP/s\n")
    print("| | useful tokens/s | ratio | of the limit | peak memory | ratio | first step after |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        if runs:
            speed, peak = middle(name, "tokens_per_second"), middle(name, "peak_bytes")
            shares = [speed * one["flop_per_token"] / one["flop_per_second"] for one in limits]
            share = f"{statistics.median(shares):.0%}" if shares else ""
            print(
                f"| {name} | {speed:,.0f} | {middle(ours, 'tokens_per_second') / speed:.2f} | {share} | "
                f"{peak / 1e9:.2f} GB | {middle(ours, 'peak_bytes') / peak:.2f} | {middle(name, 'first_step'):.1f} s |"
            )


if __name__ == "__main__":
    main()
