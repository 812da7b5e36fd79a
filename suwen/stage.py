"""The parts that the training stages share: configuration, announcement, training, evaluation, saving."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute
import torch
from accelerate import PartialState
from transformers import GenerationConfig, PrinterCallback, ProgressCallback, TrainingArguments

from suwen import attention, planning
from suwen.arguments import StageArguments
from suwen.checkpoint import UNFINISHED, checkpoint_step, explained_writing, remove_unfinished
from suwen.command_line import make_folder
from suwen.data import changed_files
from suwen.generation import window_of
from suwen.lineage import describe_lineage, find_start, is_adapter_dir, read_json
from suwen.locking import hold, refuse_abandoned_builds
from suwen.memory import refuse_divided
from suwen.model_card import model_card
from suwen.models import compute_precision, load_config, positions_of, refuse_flags, without_adapter
from suwen.nonfinite import require_finite_weights
from suwen.preflight import require_same_data
from suwen.probe import packing_problem
from suwen.progress import (
    StageLines,
    StageProgress,
    closing_lines,
    main_process,
    quiet_libraries,
    say,
)
from suwen.readers import first_line
from suwen.records import (
    command_without_secrets,
    draw_curves,
    peak_memory_bytes,
    timestamp,
    versions,
    without_secrets,
    write_json,
)
from suwen.rescale import engine_in_use
from suwen.results import publish_result
from suwen.resuming import about_run, finished_before, identity, resume_from
from suwen.stage_tasks import AskTasks, ask_result, ask_saved, check_tasks

if TYPE_CHECKING:
    from suwen.data import PreparedData

# Defaults of every stage where the library's own are not what a user of this toolkit expects.
COMMON = {
    "report_to": ["tensorboard"],
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,  # a loss that is no number stops the run instead of being left out of the mean
    "save_steps": 500,
    "save_total_limit": 3,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "seed": 42,
    "ddp_find_unused_parameters": False,
    # While the main process asks benchmarks, or writes and reads back large weights, the others wait; the library would
    # end the run after half an hour. A process or machine that is lost is noticed otherwise
    "ddp_timeout": 6 * 3600,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 8,
}


# The library's ways around whole checkpoints.
UNSAFE = {
    "save_only_model": "nothing could go on from such a checkpoint; the weights in one of ours are read like any model",
    "enable_jit_checkpoint": "SIGTERM saves a whole checkpoint already, and the library's would not be verified",
    "save_on_each_node": "a checkpoint is one folder, on a disk that all machines see",
    "ignore_data_skip": "a resumed run would train rows again that it has trained already, and others never",
    "auto_find_batch_size": "repeats rows that were trained already; give --per_device_train_batch_size auto",
}


def begin(args: StageArguments, library: dict[str, Any]) -> tuple[str, str, int]:
    """What is settled before anything heavy: the model to start from, the precision, and the tokens in a row."""
    quiet_libraries()
    for name, why in UNSAFE.items():
        if library.get(name):
            raise ValueError(f"--{name}: {why}; leave it out")
    if library.get("do_train") is False and not library.get("do_eval"):
        raise ValueError("--do_train False: leaves nothing to do; add --do_eval, or leave it out")
    trains = library.get("do_train") or not (library.get("do_eval") or "do_train" in library)
    check_tasks(args.run, trains, "deepspeed" if uses_deepspeed(library) else engine_in_use())
    if engine_in_use() == "fsdp" and (kind := os.environ.get("FSDP_STATE_DICT_TYPE")) != "FULL_STATE_DICT":
        raise ValueError(
            f"fsdp_state_dict_type: found {kind}, expected FULL_STATE_DICT as in configs/fsdp2.yaml; parts of "
            "weights would be written as pickles, and no model at the end"
        )
    if uses_deepspeed(library):
        refuse_ungathered(library)
        from torch.utils.cpp_extension import get_default_build_root

        refuse_abandoned_builds(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
    if args.model.rope_scaling and args.data.max_length is None:
        raise ValueError("--rope_scaling: give the length to stretch to by --max_length")
    precision = compute_precision(library)
    if precision == "bf16" and uses_deepspeed(library) and not torch.cuda.is_available():
        precision = "fp32"  # the library refuses bf16 without a GPU unless use_cpu is set, which DeepSpeed cannot have
    start, why = find_start(args.model.model_name_or_path, args.model.outputs, args.stage)
    say(f"start: {start} (from {why}); precision {precision}")
    if is_adapter_dir(start) and args.model.quantization != "none":
        say("its adapter goes on training as it is: --lora_rank, --target_modules and the like have no effect")
    sharding, *_ = planning.sharding_of(library)
    refuse_divided(args.model.quantization, sharding)
    if args.stage == "ppo":
        refuse_divided(args.own.reward_quantization, sharding, "--reward_quantization")
        if sharding == "fsdp2":
            raise ValueError("CONFIG=fsdp2: answers cannot be drawn from weights that FSDP spreads; use zero2 or zero3")
    config = load_config(start)
    window = window_of(config)
    if args.data.max_length == "auto":
        args.data.max_length = automatic_length(args, library, precision, start, window)
    length = args.data.max_length = args.data.max_length or min(1024, window or 1024)
    if window and length > window and not args.model.rope_scaling:
        raise ValueError(
            f"--max_length: found {length}, the model's window holds {window} tokens; give less, or --rope_scaling"
        )
    refuse_flags(config, args.model, length)
    if not args.run.dry_run:
        make_folder(args.run.output_dir)
        refuse_other_stage(Path(args.run.output_dir), args.stage)
        if main_process():
            hold(Path(args.run.output_dir))
    return start, precision, length


def refuse_ungathered(library: dict[str, Any]) -> None:
    """DeepSpeed's ZeRO-3 gathers the weights for a save only if it is told to; otherwise no model would be saved."""
    if planning.sharding_of(library)[0] != "zero3":
        return
    key = "stage3_gather_16bit_weights_on_model_save"
    if file := library.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        found = read_json(Path(file)).get("zero_optimization", {}).get(key)
    else:
        file, key = "the launcher's deepspeed_config", "zero3_save_16bit_model"
        found = os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "").lower() == "true"
    if found is not True:
        raise ValueError(
            f"{file}: found {key} {json.dumps(found)}, expected true as in configs/zero3.json; there would be no model "
            "at the end"
        )


def automatic_length(
    args: StageArguments, library: dict[str, Any], precision: str, start: str, window: int | None
) -> int | None:
    """--max_length auto: what fits into memory; None, with the reason, where that cannot be planned."""
    if args.model.rope_scaling or window is None:
        raise ValueError("--max_length auto: found no window to choose from (--rope_scaling, or none in the config)")
    values = {**COMMON, "gradient_checkpointing": True, **library}
    values |= {
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": values["gradient_checkpointing"] is not False,
    }
    args.data.max_length = None
    try:
        plan = planning.outlook(args, values, precision, start, runs_on_cpu(library))
    except planning.UNPLANNABLE as error:
        say(f"--max_length auto: no memory plan ({first_line(error)})")
        return None
    length, line = planning.choose_length(plan, window)
    say(line)
    return length


def runs_on_cpu(library: dict[str, Any]) -> bool:
    return bool(library.get("use_cpu")) or not torch.cuda.is_available()


def refuse_other_stage(output: Path, stage: str) -> None:
    """A folder that holds the result of another stage would hold weights of both."""
    other = read_json(output / "run.json").get("stage", stage)
    if other != stage:
        raise ValueError(f"--output_dir {output}: holds a run of the stage {other}, expected one of {stage}, or none")


def uses_deepspeed(library: dict[str, Any]) -> bool:
    return bool(library.get("deepspeed")) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def thinking_mode(thinking: str) -> bool | None:
    return {"auto": None, "on": True, "off": False}[thinking]


def training_config(
    args: StageArguments,
    library: dict[str, Any],
    precision: str,
    defaults: dict[str, Any],
    data: PreparedData,
) -> TrainingArguments:
    """The library's config object: common defaults, then the stage's, then what the user gave, then what must be.

    Building it starts the process group, so everything that can take long is done before.
    """
    cpu = runs_on_cpu(library)
    values: dict[str, Any] = {**COMMON, "gradient_checkpointing": "auto", **defaults, **library}
    args.outlook, lines = planning.settle(args, values, precision, cpu, data)
    say(*lines)
    deepspeed = uses_deepspeed(library)
    # With use_cpu accelerate would leave DeepSpeed aside without a word; it finds the CPU by itself.
    values |= {"output_dir": args.run.output_dir, "use_cpu": cpu and not deepspeed}
    # Without autocast the weights' own bfloat16 is used throughout; DeepSpeed reads its precision from this switch.
    values["bf16"] = precision == "bf16" and (deepspeed or not args.model.pure_bf16)
    values["fp16"] = precision == "fp16"
    if values.get("tf32") and cpu:
        say("note: --tf32 has no effect on the CPU")
        values.pop("tf32")
    if not values.get("do_train") and not values.get("do_eval"):
        values |= {"do_train": True, "do_eval": True}
    if data.validation is None:
        if not values.get("do_train"):
            raise ValueError("--do_eval: found no held-out rows; give --validation_file_dir or more training data")
        say("no held-out rows: nothing is evaluated")
    if data.validation is None or library.get("do_eval") is False:
        values["eval_strategy"] = "no"
    os.environ["TENSORBOARD_LOGGING_DIR"] = args.run.logging_dir or str(Path(args.run.output_dir) / "tensorboard")
    if values["use_cpu"]:
        start_group_on_cpus(values.get("ddp_backend"), values["ddp_timeout"])
    config = TrainingArguments(**values)
    require_same_data(data.report.fingerprint, config.device)
    return config


def start_group_on_cpus(backend: str | None, timeout: float) -> None:
    """The process group as TrainingArguments would make it, which gives `timeout` (seconds) to GPUs alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True, backend=backend, timeout=datetime.timedelta(seconds=timeout))


def dry_run(args: StageArguments, config: Any, data: PreparedData, steps: list[str] | None = None) -> None:
    """Say what the run would be: its data, memory and steps. Nothing is loaded, trained or written.

    `steps`: lines that say how many there are; None for those of packed or padded rows.
    """
    steps = steps or planning.step_lines(config, data, int(args.data.max_length or 1024), args.data.packing)
    say(*data.report.lines())
    if args.outlook is not None:
        say(*planning.describe_outlook(args.outlook))
    say(*steps, "dry run: nothing was trained, and nothing written but the cache of encoded data")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_packing(
    args: StageArguments, config: Any, model: Any, tokenizer: Any, pairs: bool = False
) -> dict[str, bool]:
    """Find out how rows can be computed together, and say so: packed, one behind another, or padded.

    Attention segment by segment comes first (`suwen.attention`); where a model cannot have it, its own attention with
    restarting positions, which keeps rows apart in many models, though not the two answers of a pair.

    Returns:
        The trainer's `packing` and `padding`.
    """
    base = without_adapter(model)
    own = base.config._attn_implementation
    problem: str | None = "--attn_implementation"
    if args.model.attn_implementation is None:
        try:
            base.set_attn_implementation(attention_name(args))
            problem = packing_problem(model, len(tokenizer), config, pairs)
        except (ValueError, NotImplementedError) as error:
            problem = first_line(error)
    if problem and args.model.shift_attn:
        raise ValueError(
            f"--shift_attn: model type {base.config.model_type!r} cannot have it ({problem}); leave it out"
        )
    if problem:
        base.set_attn_implementation(own)
        problem = packing_problem(model, len(tokenizer), config, pairs)
    if problem:
        say(f"packing off: {problem}; rows are padded, grouped by length")
    elif not args.data.packing:
        say("packing off: --packing False")
    return {"packing": args.data.packing and problem is None, "padding": problem is not None}


def attention_name(args: StageArguments) -> str:
    """Attention segment by segment, or with --shift_attn in groups of a quarter of --max_length (the paper's share)."""
    if not args.model.shift_attn:
        return attention.NAME
    group = max(2, int(args.data.max_length or 1024) // 4 // 2 * 2)
    say(f"shifted sparse attention in training, in groups of {group} tokens")
    return attention.register_shifted(group)


def reference_key(args: StageArguments, start: str, config: Any, data: PreparedData) -> str:
    """What decides the log-probabilities of a start, cheap to know and safe: hashes of weights and data, precision."""
    values = identity(args, start, describe_lineage(start), config, data)
    names = ("weights of the start", "data", "quantization", "dtype", "rope_scaling", "max_length", "bf16", "fp16")
    return str([values[name] for name in names] + [args.model.attn_implementation])


def trained_thinking(train: Any, thinking: str) -> str:
    """Whether the prompts that were trained ask for thinking: on, off, or mixed; serving goes by it."""
    if thinking != "auto" or "thinking" not in train.column_names:
        return thinking
    share = pyarrow.compute.mean(train.data.column("thinking").cast("int8")).as_py()
    return "on" if share == 1 else "off" if share == 0 else "mixed"


def planned_steps(trainer: Any) -> int:
    config = trainer.args
    if config.max_steps > 0:
        return config.max_steps
    per_step = config.per_device_train_batch_size * config.world_size
    batches = math.ceil(len(trainer.train_dataset) / per_step)
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def run_stage(
    trainer: Any,
    args: StageArguments,
    data: PreparedData,
    start: str,
    stop_token_ids: list[int],
    example: str,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Announce, resume, train, evaluate and save; the same for every stage.

    A run that has finished is not repeated; without training (--do_eval alone) the model is evaluated as it is, and
    the record of a training in the same folder stays what it was.

    Args:
        start: path of the model that the stage went on from.
        stop_token_ids: ids at which generation with the result stops; empty for a reward model.
        example: one decoded row with its trained part marked.
        extra: further entries for run.json.

    Returns:
        The content of run.json; without training, of evaluation.json.
    """
    config, output = trainer.args, Path(args.run.output_dir)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StageProgress() if not config.disable_tqdm else StageLines())
    trainer.add_callback(AskTasks(trainer, args, start))
    record = describe_run(trainer, args, data, start, extra or {})
    say(
        *data.report.lines(),
        "example row (trained part marked):",
        example,
        f"training {record['trained_parameters']:,} of {record['parameters']:,} parameters in "
        f"{'/'.join(record['trained_dtype'])} on {config.world_size} x {config.device.type}",
    )
    if not config.do_train:
        record["evaluation"] = trainer.evaluate()
        finish(trainer, record, output, "evaluation.json")
        return record
    checkpoint = resume_from(args, record, output)
    if earlier := finished_before(args, record, output, checkpoint):
        finish(trainer, earlier, output)
        if args.run.eval_tasks and main_process():
            ask_saved(args, start)
        return earlier
    if main_process():
        write_json(output / "run.json", record)
        shutil.copyfile(data.sketch, output / data.sketch.name)
    trainer.about = about_run(record)
    trainer.nonfinite.choose(args.run.on_nonfinite, trainer.is_deepspeed_enabled)
    with trainer.signals:
        record["training"] = train(trainer, checkpoint)
    trainer.signals.leave(trainer.state.global_step, output)
    say(*changed_since(data))
    if trainer.eval_dataset is not None and config.eval_strategy != "no":
        record["evaluation"] = trainer.evaluate_result()
    require_finite_weights(trainer)
    record["files"] = save_result(trainer, output, stop_token_ids, record)
    record["finished"] = True
    if main_process():
        draw_curves(trainer.state.log_history, output / "training_curves.png", f"{args.stage}: {start}")
    finish(trainer, record, output, "run.json")
    if args.run.eval_tasks and main_process():
        ask_result(trainer, args, start)
    return record


def describe_run(
    trainer: Any, args: StageArguments, data: PreparedData, start: str, extra: dict[str, Any]
) -> dict[str, Any]:
    """What run.json says before the training: what is trained, on what, from where, with what."""
    config, lineage = trainer.args, describe_lineage(start)
    sizes = [(getattr(p, "ds_numel", None) or p.numel(), p) for p in trainer.model.parameters()]
    return {
        "stage": args.stage,
        "finished": False,
        "started_at": timestamp(),
        "command": [args.stage, *command_without_secrets(args.command)],
        "arguments": {
            **without_secrets(
                dataclasses.asdict(args.model)
                | dataclasses.asdict(args.data)
                | dataclasses.asdict(args.lora)
                | (dataclasses.asdict(args.own) if args.own else {})
            ),
            "library": without_secrets(config.to_sanitized_dict()),
        },
        "start": start,
        "max_length": args.data.max_length,
        "positions": positions_of(trainer.model.config),
        "thinking": trained_thinking(data.train, args.data.thinking),
        "lineage": lineage,
        "data": data.report.to_dict(),
        "versions": versions(),
        "world_size": config.world_size,
        "trained_dtype": sorted({str(p.dtype).removeprefix("torch.") for _, p in sizes if p.requires_grad}),
        "trained_parameters": sum(size for size, p in sizes if p.requires_grad),
        "parameters": sum(size for size, _ in sizes),
        "identity": identity(args, start, lineage, config, data),
        **extra,
    }


def train(trainer: Any, checkpoint: Path | None) -> dict[str, Any]:
    """Train to the last step and say what that took; time and speed are those since the checkpoint, if there is one."""
    packs = trainer.train_dataset
    say(
        f"{planned_steps(trainer)} optimiser steps to come, over {len(packs.rows):,} rows in {len(packs):,} sequences"
        f" of {packs.tokens / len(packs):,.0f} tokens on average"
        + (f", packed in {packs.seconds:.2f} s" if packs.seconds else "")
    )
    resumed = checkpoint_step(checkpoint) if checkpoint else -1
    before = read_json(checkpoint / "trainer_state.json")["num_input_tokens_seen"] if checkpoint else 0
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    tokens, history = trainer.state.num_input_tokens_seen, trainer.state.log_history
    evaluating = sum(entry.get("eval_runtime", 0) for entry in history if entry["step"] > resumed)
    seconds = result.metrics["train_runtime"] - evaluating
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": trainer._total_loss_scalar / trainer.state.global_step,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round((tokens - before) / max(seconds, 1e-9), 1),
        "resumed_from": str(checkpoint) if checkpoint else None,
        **({"weights_of": trainer.weights_of} if trainer.weights_of else {}),
        **trainer.nonfinite.counted(),
    }


def finish(trainer: Any, record: dict[str, Any], output: Path, file: str | None = None) -> None:
    """Write the record, say how it ended, and leave the process group; every rank takes part."""
    if file:
        record |= {"finished_at": timestamp(), "peak_memory_bytes": peak_memory_bytes()}
        if main_process():
            write_json(output / file, record)
    trainer.accelerator.wait_for_everyone()
    say(*closing_lines(record, output / file if file == "evaluation.json" else output))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def changed_since(data: PreparedData) -> list[str]:
    """A line for each file that is no longer what this run has read; of the main process."""
    if not main_process():
        return []
    return [
        f"note: {path} has changed since this run read it; what it held then was trained"
        for path in changed_files(data.report.contents)
    ]


def save_result(trainer: Any, output: Path, stop_token_ids: list[int], record: dict[str, Any]) -> dict[str, Any]:
    """Write the finished model or adapter with its tokenizer, stop tokens and card; every rank takes part.

    It is written aside and moved when all of it is on the disk.

    Returns:
        Size and hash of each file; of the main process.

    Raises:
        ValueError: the disk does not take it.
    """
    trainer.model.config.use_cache = True  # switched off for training only
    aside = output / UNFINISHED / "result"
    with explained_writing(output, "the result", main_process()):
        if main_process():
            remove_unfinished(output)
            aside.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(aside))
        if not main_process():
            return {}
        umask = os.umask(0)
        os.umask(umask)
        for weights in aside.glob("*.safetensors"):  # written for the owner alone: give them the usual permissions
            weights.chmod(0o666 & ~umask)
        tokenizer = trainer.processing_class
        tokenizer.save_pretrained(aside)
        if stop_token_ids:
            stops = stop_token_ids if len(stop_token_ids) > 1 else stop_token_ids[0]
            GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id).save_pretrained(aside)
        card = model_card(record, is_adapter_dir(aside))
        (aside / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        files = publish_result(aside, output)
        shutil.rmtree(aside.parent)
        return files
