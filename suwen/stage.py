"""The parts that the training stages share: configuration, announcement, training, evaluation, saving."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PrinterCallback, ProgressCallback, TrainerCallback

from suwen.adapters import describe_lineage
from suwen.arguments import StageArguments
from suwen.checkpoint import find_checkpoint, identity_difference
from suwen.models import compute_precision, file_sha256, find_start, load_config, read_json
from suwen.packing import packing_problem
from suwen.records import draw_curves, peak_memory_bytes, timestamp, versions, without_secrets, write_json

if TYPE_CHECKING:
    from suwen.data import PreparedData

# Defaults of every stage where the library's own are not what a user of this toolkit expects.
COMMON = {
    "report_to": ["tensorboard"],
    "logging_steps": 10,
    "logging_first_step": True,
    "save_steps": 500,
    "save_total_limit": 3,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "seed": 42,
    "ddp_find_unused_parameters": False,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 8,
}
# Arguments that do not change what is learned: a run may be resumed with other values.
FREE_TO_CHANGE = {
    "output_dir", "resume", "outputs", "do_train", "do_eval", "logging_steps", "logging_first_step", "save_steps",
    "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "report_to", "run_name", "num_proc",
    "cache_dir", "logging_dir",
    "dataloader_num_workers", "disable_tqdm", "on_bad_rows", "max_eval_samples", "per_device_eval_batch_size",
    "log_level",
}  # fmt: skip


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(*lines: str) -> None:
    """Print on the main process only."""
    if main_process():
        for line in lines:
            print(line, flush=True)


def quiet_libraries() -> None:
    """Keep the libraries' routine warnings off the screen; errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    for name in ("transformers", "trl", "accelerate", "datasets", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def begin(args: StageArguments, library: dict[str, Any]) -> tuple[str, str, int]:
    """What is settled before anything heavy: the model to start from, the precision, and the tokens in a row."""
    quiet_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, warns
    if args.model.rope_scaling and args.data.max_length is None:
        raise ValueError("--rope_scaling: give the length to stretch to by --max_length")
    precision = compute_precision(library)
    if precision == "bf16" and uses_deepspeed(library) and not torch.cuda.is_available():
        precision = "fp32"  # the library refuses bf16 without a GPU unless use_cpu is set, which DeepSpeed cannot have
    start, why = find_start(args.model.model_name_or_path, args.model.outputs, args.stage)
    say(f"start: {start} (from {why}); precision {precision}")
    window = getattr(load_config(start), "max_position_embeddings", None)
    length = args.data.max_length = args.data.max_length or min(1024, window or 1024)
    if window and length > window and not args.model.rope_scaling:
        raise ValueError(
            f"--max_length: found {length}, the model's window holds {window} tokens; give less, or --rope_scaling"
        )
    return start, precision, length


def uses_deepspeed(library: dict[str, Any]) -> bool:
    return bool(library.get("deepspeed")) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def thinking_mode(thinking: str) -> bool | None:
    return {"auto": None, "on": True, "off": False}[thinking]


def training_config(
    args: StageArguments,
    config_class: type,
    library: dict[str, Any],
    precision: str,
    defaults: dict[str, Any],
    **fixed: Any,
) -> Any:
    """The library's config object: common defaults, then the stage's, then what the user gave, then what must be.

    Building it starts the process group, so everything that can take long is done before.
    """
    cpu = library.get("use_cpu") or not torch.cuda.is_available()
    values: dict[str, Any] = {**COMMON, "gradient_checkpointing": not cpu, **defaults, **library}
    deepspeed = uses_deepspeed(library)
    # With use_cpu accelerate would leave DeepSpeed aside without a word; it finds the CPU by itself.
    values |= {"output_dir": args.run.output_dir, "use_cpu": cpu and not deepspeed, **fixed}
    # Without autocast the weights' own bfloat16 is used throughout; DeepSpeed reads its precision from this switch.
    values["bf16"] = precision == "bf16" and (deepspeed or not args.model.pure_bf16)
    values["fp16"] = precision == "fp16"
    if values.get("tf32") and cpu:
        say("note: --tf32 has no effect on the CPU")
        values.pop("tf32")
    if not values.get("do_train") and not values.get("do_eval"):
        values |= {"do_train": True, "do_eval": True}
    os.environ["TENSORBOARD_LOGGING_DIR"] = args.run.logging_dir or str(Path(args.run.output_dir) / "tensorboard")
    Path(args.run.output_dir).mkdir(parents=True, exist_ok=True)
    return config_class(**values)


def choose_packing(config: Any, wanted: bool, library: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Pack rows where the model keeps them apart; otherwise pad them, grouped by length, and say why."""
    problem = packing_problem(model, len(tokenizer)) if wanted else "--packing False"
    config.packing = problem is None
    if problem is None:
        config.per_device_eval_batch_size = 1  # packed sequences of a batch are joined into one: count them one by one
    else:
        config.train_sampling_strategy = library.get("train_sampling_strategy", "group_by_length")
        say(f"packing off: {problem}")


def identity(args: StageArguments, start: str, config: Any, data: PreparedData) -> dict[str, Any]:
    """Everything that decides what a run learns: a checkpoint may only be resumed by the same."""
    values: dict[str, Any] = {"start": start, "data": data.report.fingerprint, "world_size": config.world_size}
    for part in (args.model, args.data, args.lora):
        values |= dataclasses.asdict(part)
    given = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in COMMON or f.name in LEARNING
    }
    values |= given
    values.pop("model_name_or_path")
    return {
        k: v if isinstance(v, (int, float, bool, type(None))) else str(v)
        for k, v in values.items()
        if k not in FREE_TO_CHANGE
    }


LEARNING = {
    "learning_rate", "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "bf16", "fp16", "neftune_noise_alpha", "data_seed", "beta", "loss_type",
    "loss_weights", "label_smoothing", "label_smoothing_factor", "packing",
}  # fmt: skip


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


class RefuseNonFinite(TrainerCallback):
    """Stop when the loss is no longer a number, before a broken model is saved over a good one."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise ValueError(
                f"step {state.global_step}: the training loss is {loss}; lower --learning_rate, or use --bf16 instead "
                "of --fp16"
            )


# What a log line shows, in this order; the rest is in TensorBoard and in trainer_state.json.
SHOWN = {
    "loss": "loss", "eval_loss": "held-out loss", "eval_perplexity": "perplexity", "mean_token_accuracy": "accuracy",
    "eval_token_accuracy": "accuracy", "rewards/accuracies": "reward accuracy", "rewards/margins": "margin",
    "eval_rewards/accuracies": "reward accuracy", "eval_rewards/margins": "margin", "grad_norm": "gradient",
    "learning_rate": "rate",
}  # fmt: skip


class StageLines(TrainerCallback):
    """A log line for people instead of the trainer's dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = [f"{name} {float(logs[key]):.4g}" for key, name in SHOWN.items() if key in (logs or {})]
        if state.is_world_process_zero and parts:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts), file=sys.stdout)
            sys.stdout.flush()


class StageProgress(StageLines, ProgressCallback):
    """The same beside the trainer's progress bar."""


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

    Args:
        start: path of the model that the stage went on from.
        stop_token_ids: ids at which generation with the result stops.
        example: one decoded row with its trained part marked.
        extra: further entries for run.json.

    Returns:
        The content of run.json.
    """
    config, output = trainer.args, Path(args.run.output_dir)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StageProgress() if not config.disable_tqdm else StageLines())
    trainer.add_callback(RefuseNonFinite())
    own_identity = identity(args, start, config, data)
    trained = sum(
        p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in trainer.model.parameters() if p.requires_grad
    )
    total = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in trainer.model.parameters())
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad}
    record: dict[str, Any] = {
        "stage": args.stage,
        "finished": False,
        "started_at": timestamp(),
        "command": [f"{args.stage}", *args.command],
        "arguments": {
            **dataclasses.asdict(args.model),
            **dataclasses.asdict(args.data),
            **dataclasses.asdict(args.lora),
            "library": without_secrets(config.to_sanitized_dict()),
        },
        "start": start,
        "max_length": args.data.max_length,
        "thinking": trained_thinking(data.train, args.data.thinking),
        "lineage": describe_lineage(start),
        "data": data.report.to_dict(),
        "versions": versions(),
        "world_size": config.world_size,
        "trained_dtype": sorted(dtypes),
        "trained_parameters": trained,
        "parameters": total,
        **(extra or {}),
    }
    say(
        *data.report.lines(),
        "example row (trained part marked):",
        example,
        f"training {trained:,} of {total:,} parameters in {'/'.join(sorted(dtypes))} on {config.world_size} x "
        f"{config.device.type}",
    )
    checkpoint = resume_from(args, own_identity, output)
    record["identity"] = own_identity
    if main_process():
        write_json(output / "run.json", record)
    if config.do_train:
        steps = planned_steps(trainer)
        say(f"{steps} optimiser steps over {len(trainer.train_dataset):,} sequences to come")
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        tokens = trainer._total_train_tokens
        resumed_step = int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else -1
        evaluating = sum(e.get("eval_runtime", 0) for e in trainer.state.log_history if e["step"] > resumed_step)
        seconds = result.metrics["train_runtime"] - evaluating
        record["training"] = {
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "loss": result.training_loss,
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "resumed_from": str(checkpoint) if checkpoint else None,
        }
    if trainer.eval_dataset is not None:
        # The trainer may have evaluated after the last step already.
        done = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == trainer.state.global_step]
        record["evaluation"] = done[-1] if done else trainer.evaluate()
    if config.do_train:
        save_result(trainer, output, stop_token_ids)
        adapter = output / "adapter_model.safetensors"
        record["files"] = {adapter.name: file_sha256(adapter)} if adapter.is_file() else {}
    record |= {"finished": bool(config.do_train), "finished_at": timestamp(), "peak_memory_bytes": peak_memory_bytes()}
    if main_process():
        draw_curves(trainer.state.log_history, output / "training_curves.png", f"{args.stage}: {start}")
        write_json(output / "run.json", record)
    trainer.accelerator.wait_for_everyone()
    say(*closing_lines(record, output))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return record


def resume_from(args: StageArguments, own_identity: dict[str, Any], output: Path) -> Path | None:
    """The checkpoint to go on from; refuses one of a run that learned from something else."""
    if torch.distributed.is_initialized() and not main_process():
        torch.distributed.barrier()  # the main process sets broken checkpoints aside first
    checkpoint, lines = find_checkpoint(output, args.run.resume, writer=main_process())
    if torch.distributed.is_initialized() and main_process():
        torch.distributed.barrier()
    say(*lines)
    recorded = read_json(output / "run.json").get("identity") if checkpoint and args.run.resume == "auto" else None
    if recorded and (difference := identity_difference(recorded, own_identity)):
        raise ValueError(
            f"--output_dir {output}: holds checkpoints of another run ({difference}); give another --output_dir, or "
            "--resume never to start anew"
        )
    return checkpoint


def save_result(trainer: Any, output: Path, stop_token_ids: list[int]) -> None:
    """Write the finished model or adapter with its tokenizer and stop tokens; every rank takes part."""
    trainer.model.config.use_cache = True  # switched off for training only
    trainer.save_model(str(output))
    if main_process():
        shutil.rmtree(
            output / "ref", ignore_errors=True
        )  # the frozen copy of a quantised adapter: the reference of this run
        umask = os.umask(0)
        os.umask(umask)
        for weights in output.glob("*.safetensors"):  # written for the owner alone: give them the usual permissions
            weights.chmod(0o666 & ~umask)
        tokenizer = trainer.processing_class
        tokenizer.save_pretrained(output)
        stops = stop_token_ids if len(stop_token_ids) > 1 else stop_token_ids[0]
        GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id).save_pretrained(output)


def closing_lines(record: dict[str, Any], output: Path) -> list[str]:
    lines = []
    if training := record.get("training"):
        lines.append(
            f"trained {training['steps']} steps, {training['tokens']:,} tokens at "
            f"{training['tokens_per_second']:,.0f} tokens/s; mean loss {training['loss']:.4f}; "
            f"peak memory {record['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    if evaluation := record.get("evaluation"):
        shown = {
            "eval_loss": "loss", "eval_perplexity": "perplexity", "eval_token_accuracy": "token accuracy",
            "eval_rewards/accuracies": "reward accuracy", "eval_rewards/margins": "reward margin",
        }  # fmt: skip
        parts = [f"{name} {evaluation[key]:.4f}" for key, name in shown.items() if key in evaluation]
        lines.append("held out: " + ", ".join(parts))
    return [*lines, f"wrote {output}"]
