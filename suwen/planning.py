"""Whether a stage's run fits, from its own flags and data, before a weight is loaded; and the switches that follow.

`auto` takes what the plan (`suwen.memory`) says for the memory that is free to this process: that of its GPU, or on a
CPU that of the machine or of the container. Each choice is said in a line.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute
import torch

from suwen.arguments import parse_rewards
from suwen.lineage import find_start, is_adapter_dir, read_json
from suwen.memory import (
    PAIRED,
    SAFE_SHARE,
    Outlook,
    Setting,
    amount,
    describe,
    frozen_bytes,
    plan_memory,
    shape_of,
)
from suwen.models import load_config
from suwen.packing import pack_best_fit
from suwen.readers import first_line

if TYPE_CHECKING:
    from datasets import Dataset

    from suwen.arguments import StageArguments
    from suwen.data import PreparedData

LENGTHS = [2**power for power in range(7, 18)]  # that --max_length auto tries, beside the model's window
UNPLANNABLE = (ValueError, AttributeError, KeyError, TypeError, RuntimeError)  # what building an odd model may raise
PARTS_OF_A_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")


# The memory that there is


def memory_for_us(cpu: bool) -> tuple[float, str]:
    """Bytes that this process may take, and whose they are.

    One process takes what is free now. Of several, each must come to the same answer without asking the others: there
    it is what the smallest card has in all, or a share of main memory.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and processes == 1:
        return float(torch.cuda.mem_get_info(0)[0]), "free on the GPU"
    if not cpu:
        cards = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return float(min(cards)), "on the smallest GPU"
    free = processes == 1
    limits = [(main_memory(free), "of main memory"), *((limit, "in the container") for limit in cgroup_limits(free))]
    size, where = min(limits)
    return (size, f"{where} free") if free else (size / processes, f"{where}, a share of {processes} processes")


def main_memory(free: bool, file: str = "/proc/meminfo") -> float:
    """Bytes of main memory that Linux can give without swapping, or has at all."""
    try:
        lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
        return float(lines["MemAvailable" if free else "MemTotal"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cgroup_limits(free: bool, root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> list[float]:
    """The memory limits on this process (cgroups version 2), or what is left of them; cached files count as free."""
    try:
        place = next(line[3:] for line in Path(own).read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = Path(root + place)
    found = []
    for group in (folder, *folder.parents):
        try:
            limit = float((group / "memory.max").read_text())  # "max" is no number: no limit at this level
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat.get("file", 0))
        except (OSError, ValueError):
            continue
        found.append(max(0.0, limit - used) if free else limit)
    return found


# What is planned


def sharding_of(library: dict[str, Any]) -> tuple[str, bool, bool]:
    """How the processes share the work, as the launcher and --deepspeed set it; whether the optimizer, and whether the
    weights, are offloaded."""
    file = library.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        zero = read_json(Path(str(file))).get("zero_optimization", {}) if file else {}
        stage = zero.get("stage") or int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        there = [zero.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")]
        return f"zero{stage}", there[0], there[1]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2", False, False
    return ("ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "none"), False, False


def outlook(args: StageArguments, values: dict[str, Any], precision: str, start: str, cpu: bool) -> Outlook:
    """The plan of a stage's flags, with rows of --max_length.

    Args:
        values: the library's flags, with the defaults of the stage.

    Raises:
        ValueError: a flag that cannot be, or a model whose parts the planner cannot count.
    """
    goes_on = is_adapter_dir(start) and args.model.quantization != "none"
    rank = read_json(Path(start) / "adapter_config.json").get("r", 8) if goes_on else args.lora.lora_rank
    sharding, offload, offload_weights = sharding_of(values)
    adapts = args.lora.use_peft and not goes_on
    targets = args.lora.target_modules if adapts else "all"
    shape = shape_of(load_config(start), targets, args.model.attn_implementation)
    setting = Setting(
        stage=args.stage,
        use_peft=args.lora.use_peft,
        lora_rank=rank,
        lora_dropout=args.lora.lora_dropout if args.stage in ("pt", "sft", "rm") else 0.0,
        quantization=args.model.quantization,
        precision=precision,
        pure_bf16=args.model.pure_bf16,
        tokens=int(args.data.max_length or 1024),
        batch=values["per_device_train_batch_size"],
        gradient_accumulation_steps=values["gradient_accumulation_steps"],
        gradient_checkpointing=values["gradient_checkpointing"],
        optim=str(values.get("optim", "adamw_torch")),
        sharding=sharding,
        num_gpus=int(os.environ.get("WORLD_SIZE", "1")),
        offload=offload,
        offload_weights=offload_weights,
        device="cpu" if cpu else "cuda",
        generation_batch=getattr(args.own, "generation_batch_size", 32),
        new_adapter=not goes_on,
        reward_bytes=reward_bytes(args, cpu) if args.stage == "ppo" else 0.0,
    )
    return Outlook(shape, setting, *memory_for_us(cpu))


def reward_bytes(args: StageArguments, cpu: bool) -> float:
    """Bytes of the reward models that PPO loads beside the policy."""
    given = args.own
    named = [parse_rewards(text) for text in (given.reward, given.held_out_reward) if text]
    folders = [name.removeprefix("model:") for pairs in named for name, _ in pairs if name.startswith("model:")]
    setting = Setting(quantization=given.reward_quantization, precision="fp32" if cpu else "bf16")
    return sum(sum(frozen_bytes(shape_of(load_config(folder)), setting)) for folder in folders)


def row_lengths(rows: Dataset, answer: int = 0) -> np.ndarray:
    """(N,) tokens of each row as it is computed; of prompts with an answer of `answer` tokens."""
    names = ["input_ids"] if "input_ids" in rows.column_names else PARTS_OF_A_PAIR
    columns = [rows.data.column(name) for name in names if name in rows.column_names]
    lengths = [pyarrow.compute.list_value_length(column).to_numpy() for column in columns]
    return np.sum(lengths, axis=0, dtype=np.int64) + answer


def with_data(plan: Outlook, data: PreparedData, packing: bool, answer: int = 0) -> Outlook:
    """The same plan for the longest sequence of the data; packs are full where there is enough to fill one."""
    lengths = row_lengths(data.train, answer)
    longest = int(lengths.max())
    packed = packing and not plan.shape.padded
    tokens = max(longest, min(plan.setting.tokens, int(lengths.sum()))) if packed else longest
    if plan.setting.stage in PAIRED:
        tokens = -(-tokens // 2)
    report = data.report
    share = report.trained_tokens / report.tokens if report.trained_tokens else 1.0  # of prompts none is counted
    return plan.changed(tokens=tokens, row_tokens=longest, trained_share=min(1.0, share))


# What `auto` takes


def settle(
    args: StageArguments, values: dict[str, Any], precision: str, cpu: bool, data: PreparedData
) -> tuple[Outlook | None, list[str]]:
    """Put a value in the place of every `auto` among the library's flags `values`.

    Returns:
        The plan of the run with these values, None where the planner does not know the model; and lines that say what
        was chosen, and why.
    """
    answer = args.own.max_new_tokens if args.stage == "ppo" else 0
    rows = values["gradient_accumulation_steps"]
    automatic_batch = values["per_device_train_batch_size"] == "auto"
    automatic_checkpointing = values["gradient_checkpointing"] == "auto"
    if automatic_batch:
        values["per_device_train_batch_size"] = 1
    if automatic_checkpointing:
        values["gradient_checkpointing"] = not cpu
    start, _ = find_start(args.model.model_name_or_path, args.model.outputs, args.stage)
    try:
        plan = outlook(args, values, precision, start, cpu)
    except UNPLANNABLE as error:  # a model that the planner does not know may still be trained
        if first_line(error).startswith("--"):
            raise
        return None, [f"no memory plan: {first_line(error)}"]
    plan = with_data(plan, data, args.data.packing, answer)
    lines = []
    if automatic_checkpointing:
        values["gradient_checkpointing"], line = choose_checkpointing(plan)
        plan = plan.changed(gradient_checkpointing=values["gradient_checkpointing"])
        lines.append(line)
    if automatic_batch:
        size, line = choose_batch(plan, rows)
        values["per_device_train_batch_size"], values["gradient_accumulation_steps"] = size, rows // size
        plan = plan.changed(batch=size, gradient_accumulation_steps=rows // size)
        lines.append(line)
    if not plan.fits():
        lines.append(f"warning: {amount(plan.total())} planned; {plan.advice()}")
    return plan, lines


def choose_length(plan: Outlook, window: int) -> tuple[int, str]:
    """The longest rows, up to the model's window, that fit with one row in a micro-batch; and why."""
    candidates = sorted({*(length for length in LENGTHS if length < window), window}, reverse=True)
    for length in candidates:
        changes = {"tokens": length, "batch": 1, "gradient_checkpointing": True}
        if plan.fits(**changes):
            break
    needs = f"{amount(plan.total(**changes))} planned, {amount(plan.capacity)} {plan.where}"
    return length, f"--max_length auto: {length} tokens ({needs}; the model's window holds {window})"


def choose_checkpointing(plan: Outlook) -> tuple[bool, str]:
    """Recompute activations only where they do not fit; and why."""
    needs = plan.total(gradient_checkpointing=False)
    on = needs > SAFE_SHARE * plan.capacity
    why = f"{amount(needs)} planned without it, {amount(plan.capacity)} {plan.where}"
    return on, f"gradient checkpointing {'on' if on else 'off'}: {why}"


def choose_batch(plan: Outlook, rows: int) -> tuple[int, str]:
    """The largest micro-batch that fits and divides the rows of an optimiser step on a process; and why."""
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    size = next((size for size in sizes if plan.fits(batch=size, gradient_accumulation_steps=rows // size)), 1)
    needs = plan.total(batch=size, gradient_accumulation_steps=rows // size)
    why = f"{amount(needs)} planned, {amount(plan.capacity)} {plan.where}"
    return size, f"--per_device_train_batch_size auto: {size}, accumulated {rows // size} times ({why})"


# What a dry run prints


def describe_outlook(plan: Outlook) -> list[str]:
    """The plan as a table, and whether it fits."""
    setting = plan.setting
    what = f"{setting.batch} x {setting.tokens} tokens" if setting.stage != "ppo" else f"{setting.tokens} tokens"
    if setting.stage in PAIRED:
        what += " for each answer of a pair"
    return [
        f"memory of a process, planned for {what}, gradient checkpointing "
        f"{'on' if setting.gradient_checkpointing else 'off'}",
        *describe(plan_memory(plan.shape, setting)),
        f"  {plan.advice()}",
    ]


def step_lines(config: Any, data: PreparedData, max_length: int, packing: bool) -> list[str]:
    """How many optimiser steps there are to come, packed and padded."""
    lengths = row_lengths(data.train)

    def steps(sequences: int) -> int:
        if config.max_steps > 0:
            return config.max_steps
        batches = math.ceil(sequences / (config.per_device_train_batch_size * config.world_size))
        return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))

    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    lines = []
    if packing:
        packs = len(pack_best_fit(lengths, max(max_length, int(lengths.max()))))
        lines.append(f"{steps(packs):,} optimiser steps over {packs:,} packed sequences, {rows} in a step")
    padded = f"{steps(len(lengths)):,} optimiser steps over {len(lengths):,} rows, {rows} in a step"
    return [*lines, f"where the model cannot keep packed rows apart: {padded}" if packing else padded]
