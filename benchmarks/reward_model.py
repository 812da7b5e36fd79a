"""Speed and memory of reward modelling beside TRL's RewardTrainer.

    python -m benchmarks.reward_model --rounds 3

Both train the same random model and head on the same pairs, as many pairs an optimiser step, in a process of its own;
rounds alternate. `useful` tokens are those of a pair, prompt and both answers, once each; padding and the second copy
of the prompt do not count.

    suwen        this project: pairs packed by best fit, their prompt computed once, scored at two positions
    trl best     TRL's RewardTrainer without gradient checkpointing
    trl          with its defaults
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.training import ROOT, ROWS_PER_STEP, draw_rows, print_table

CONTENDERS = ("suwen", "trl best", "trl")


def build_model(vocabulary: int) -> Any:
    """The backbone of `benchmarks.training` under a head of one score."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, num_labels=1, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config)


def work(contender: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train one epoch and say how long it took; runs in a process of its own."""
    began = time.perf_counter()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
    from trl import RewardConfig, RewardTrainer

    from suwen.models import compute_precision
    from suwen.records import peak_memory_bytes

    precision = compute_precision({})
    rows = draw_rows("dpo", given.rows, given.vocabulary, given.longest)
    useful = sum(len(ids) for row in rows for ids in row.values())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    lora = None
    if given.method == "lora":
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="SEQ_CLS")
    model = build_model(given.vocabulary).to(torch.bfloat16 if precision == "bf16" and lora else torch.float32)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "report_to": [], "save_strategy": "no", "logging_steps": 10, "seed": 1,
        "learning_rate": 1e-4, "num_train_epochs": 1, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
        "bf16": precision == "bf16", "fp16": precision == "fp16", "gradient_checkpointing": contender == "trl",
    }  # fmt: skip
    marks: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.setdefault("first_step", time.perf_counter() - began)

    start = time.perf_counter()  # packing belongs to the training
    trainer: Any
    if contender == "suwen":
        from suwen import attention, trainers
        from suwen.arguments import RewardArguments
        from suwen.head import add_reward_forward

        add_reward_forward(model)
        model.set_attn_implementation(attention.NAME)
        steps = max(1, ROWS_PER_STEP // max(1, round(given.longest * len(rows) / useful)))
        config = TrainingArguments(**common, per_device_train_batch_size=1, gradient_accumulation_steps=steps)
        trainer = trainers.RewardTrainer(
            model=model, settings=RewardArguments(), args=config, train_dataset=Dataset.from_list(rows),
            eval_dataset=None, processing_class=tokenizer, max_length=given.longest, peft_config=lora,
        )  # fmt: skip
    else:

        class Encoded(RewardTrainer):
            def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                return dataset

        whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
        config = RewardConfig(
            **common, per_device_train_batch_size=4, gradient_accumulation_steps=ROWS_PER_STEP // 4, max_length=None,
            center_rewards_coefficient=0.01,
        )  # fmt: skip
        trainer = Encoded(
            model=model, args=config, train_dataset=Dataset.from_list(whole), processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "tokens_per_second": useful / (time.perf_counter() - start),
        "peak_bytes": peak_memory_bytes(),
        "first_step": marks["first_step"],
        "precision": precision,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--longest", type=int, default=1024, help="tokens in a row, and in a pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.task = "reward model"
    if given.worker:
        print("RESULT " + json.dumps(work(given.worker, given)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    words = [f"--{key}={value}" for key, value in vars(given).items() if key not in ("worker", "rounds", "task")]
    for number in range(given.rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.reward_model", *words, "--worker", name]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{name}: failed\n{done.stderr[-3000:]}")
            results[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
            speed = results[name][-1]["tokens_per_second"]
            print(f"round {number + 1}  {name:<9} {speed:8.0f} tokens/s", file=sys.stderr, flush=True)
    print_table(given, results)


if __name__ == "__main__":
    main()
