"""Runs of every stage on a tiny model, in this process or in one that may be killed, and what they leave."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from processes import SCRIPTS, Started, run
from tiny import tiny_model, tiny_tokenizer

from template import TEMPLATES

__all__ = ["SCRIPTS", "Started", "build_base", "history", "run", "weights_sha256", "words", "write_rows"]

SYMPTOMS = ("高血压", "糖尿病", "发热", "咳嗽", "头痛", "失眠")
TIMES = ("seconds", "runtime", "per_second", "num_input_tokens_seen", "total_flos")  # what no two runs have alike


def build_base(folder: Path) -> str:
    tokenizer = tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    return str(folder)


def write_rows(file: Path, stage: str, count: int = 24) -> str:
    rows: list[dict[str, Any]] = []
    for number in range(count):
        question = f"{number}号病人{SYMPTOMS[number % 6]}，应当怎么办？" + "请说明理由。" * (number % 3)
        answer = f"建议尽早到医院就诊，由医生检查后决定第{number}号病人如何治疗。"
        if stage == "pt":
            rows.append({"text": question + answer})
        elif stage in ("sft", "ppo"):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": turns})
        else:
            prompt = [{"from": "human", "value": question}]
            rows.append({"conversations": prompt, "chosen": answer, "rejected": f"不用管{number}号。"})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def words(stage: str, base: str, data: str, output: Path, *more: str) -> list[str]:
    """A command line whose run takes a second; its encoded data is kept beside the data."""
    found = f"""--model_name_or_path {base} --train_file_dir {data} --output_dir {output} --cache_dir {data}.cache
        --num_proc 1 --bf16 False --use_cpu --max_length 256 --validation_split_fraction 0 --report_to none
        --gradient_accumulation_steps 2 --logging_steps 1 --disable_tqdm True --learning_rate 1e-3"""
    if stage == "ppo":
        found += """ --max_new_tokens 6 --per_device_train_batch_size 2 --num_ppo_epochs 2 --num_mini_batches 2
            --reward length=1.0,language=1.0 --missing_eos_penalty 0.2"""
    return [*found.split(), *more]


def weights_sha256(output: Path) -> str:
    [file] = output.glob("*model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """What was logged of every step up to a checkpoint, exact to the bit, without times."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert all(math.isfinite(entry.get("loss", 0.0)) for entry in entries)
    return [{k: v for k, v in entry.items() if not any(time in k for time in TIMES)} for entry in entries]
